"""What the paper measured (arXiv 2112.10769) and what others measured of its scheme.

Of networks for images ImageNet top-1 in per cent, of Transformer-base tokenized BLEU on WMT14 English to German, of
BERT-base F1 in per cent on SQuAD v1.1; and the outcomes that the figures show.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A number of the paper, or what it says where it gives none; what: of which model."""

    value: float | None
    what: str


class Replication(NamedTuple):
    """What others measured: their fp32, their LUQ, and of what."""

    fp32: float
    luq: float
    what: str

    @property
    def difference(self) -> float:
        return self.luq - self.fp32


TRANSFORMER, BERT = "Transformer-base, tokenized BLEU", "BERT-base, SQuAD F1"
BASELINES = {
    "ResNet-18": 69.7,
    "ResNet-50": 76.5,
    "MobileNet-V2": 71.9,
    "ResNeXt-50": 77.6,
    TRANSFORMER: 27.5,
    BERT: 87.03,
    "ViT-B": 76.2,
}
# Which of the paper's models ours is, or stands for in small.
MODELS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNet-V2",
    "resnext50_32x4d": "ResNeXt-50",
    "vit_b_16": "ViT-B",
    "resnet8": "ResNet-18",
    "mobilenet_tiny": "MobileNet-V2",
    "resnext8": "ResNeXt-50",
    "vit_tiny": "ViT-B",
    "transformer_base": TRANSFORMER,
    "transformer_tiny": TRANSFORMER,
    "bert": BERT,
    "bert_tiny": BERT,
}
TABLE2 = {
    "luq": {
        "ResNet-18": 69.09,
        "ResNet-50": 75.42,
        "MobileNet-V2": 69.55,
        "ResNeXt-50": 76.02,
        TRANSFORMER: 27.17,
        BERT: 85.75,
        "ViT-B": 73.7,
    },
    "luq_smp2": {
        "ResNet-18": 69.24,
        "ResNet-50": 75.63,
        "MobileNet-V2": 69.7,
        "ResNeXt-50": 76.12,
        TRANSFORMER: 27.25,
        BERT: 85.9,
        "ViT-B": 74.1,
    },
    # Ultra-low's own, and said to be so: ours has its radix and its two phases, not its scales and exceptions.
    "radix4_tpr": {"ResNet-18": 68.27, "ResNet-50": 74.01, "MobileNet-V2": 68.85, TRANSFORMER: 25.4},
}
# Xi et al. 2023, their column LSQ + LUQ. That of Transformer-base is quoted from the paper, so it is not here.
REPLICATIONS = {
    BERT: (Replication(88.32, 85.75, "BERT-base, SQuAD F1; the paper's own number to the digit, perhaps quoted"),),
    "ViT-B": (
        Replication(73.1, 69.96, "DeiT-S, ImageNet from scratch"),
        Replication(81.88, 77.25, "ViT-B/32, ImageNet fine-tune"),
    ),
}
ABOUT_REPLICATIONS = (
    "Others' LUQ: Xi et al. 2023, arXiv 2306.11987, where LSQ quantizes weights and activations, not SAWB; the LUQ in "
    "the code that they published has 21 levels and a bias, so it may be a weaker one."
)
TABLE3 = {
    "ResNet-18": {"none": 69.24, "fnt1": 69.7},
    "ResNet-50": {"none": 75.63, "fnt1": 75.89, "fnt2": 76.0, "fnt3": 76.18},
    "MobileNet-V2": {"none": 69.7, "fnt1": 70.1, "fnt2": 70.3, "fnt3": 70.3},
    "ResNeXt-50": {"none": 76.12, "fnt1": 76.25, "fnt2": 76.33, "fnt3": 76.7},
}
FIG2 = {
    "biased_log": "diverges",
    "fp4_sr": "large loss",
    "fp4_su": "large loss",
    "uniform_sr": "diverges",
}
OUTCOMES = {
    "fig1b": {"forward_only": "RDN wins", "forward_sr": "SR loses"},
    "fig1c": {"backward_only": "SR wins", "backward_nearest": "RDN loses"},
    "fig5": {"fp2_both16": "about full precision"},
    "table6": {"backward_only": "the more sensitive"},
    "options": {"luq_pow2": "small cost"},
}


def published(table: str, row: str, column: str) -> Published | None:
    """The paper's number, or word, for a cell; None where it has neither."""
    model = MODELS.get(row)
    if table == "fig2":
        if row in FIG2:
            return Published(None, FIG2[row])
        values = {"fp32": BASELINES["ResNet-50"], "luq": TABLE2["luq"]["ResNet-50"]}
        return Published(values[row], "ResNet-50") if row in values else None
    if table == "table2" and model is not None:
        value = BASELINES.get(model) if column == "fp32" else TABLE2.get(column, {}).get(model)
        what = f"{model}, Ultra-low" if column == "radix4_tpr" else model
        return None if value is None else Published(value, what)
    if table == "table3" and model is not None:
        quant, _, finetune = column.rpartition("_")
        if column == "fp32_none":
            return Published(BASELINES[model], model)
        value = TABLE3.get(model, {}).get(finetune) if quant == "luq_smp2" else None
        return None if value is None else Published(value, model)
    word = OUTCOMES.get(table, {}).get(column if table == "table6" else row)
    return None if word is None else Published(None, word)


def replications(table: str, row: str, column: str) -> tuple[Replication, ...]:
    """What others measured of a cell of the paper's; () where nobody did."""
    return REPLICATIONS.get(MODELS.get(row, ""), ()) if (table, column) == ("table2", "luq") else ()
