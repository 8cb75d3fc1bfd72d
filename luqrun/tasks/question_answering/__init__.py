"""Question answering: the answer to a question is a span of a paragraph."""

GENERATED = "facts"
NAMES = ("squad", GENERATED)  # of data sets
