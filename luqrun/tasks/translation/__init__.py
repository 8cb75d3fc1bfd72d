"""Translation: parallel text, subwords, a Transformer, BLEU."""

GENERATED = "sentences"
NAMES = (GENERATED, "parallel", "multi30k", "wmt14")  # of data sets
