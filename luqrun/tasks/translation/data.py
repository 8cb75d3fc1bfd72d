"""Parallel text by name, as the loaders want it: subwords of training, validation and test pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from luqrun.config import DatasetConfig
from luqrun.errors import UserError, check_at_least, check_at_most, check_choice
from luqrun.tasks.padding import describe_padding
from luqrun.tasks.settings import check_common, check_read
from luqrun.tasks.subset import subset
from luqrun.tasks.translation import GENERATED, NAMES, parallel_text, sentences
from luqrun.tasks.translation.batches import BucketedPairs, SentencePairs
from luqrun.tasks.translation.parallel_text import Pairs
from luqrun.tasks.translation.subwords import FEWEST, Subwords, subwords_of

READ = ("source", "target", "vocabulary", "max_length", "batch_tokens")  # of dataset.*, beside what all data sets read
MAX_LENGTH = 4096
MAX_EXAMPLES = 1_000_000


def validate_dataset(config: DatasetConfig) -> None:
    """Raise UserError naming the first key under `dataset` whose value is not allowed; no file is looked at."""
    check_choice("dataset.name", config.name, NAMES)
    check_common(config)
    check_read(config, (*READ, "examples") if config.name == GENERATED else (*READ, "root"))
    for key in ("source", "target"):
        language = getattr(config, key)
        if not re.fullmatch(r"\w[\w-]*", language):
            raise UserError(f"dataset.{key}={language} must be how the files end, such as en")
    if config.source == config.target:
        raise UserError(f"dataset.source and dataset.target are both {config.source}; they must be two languages")
    if config.name == GENERATED:
        check_at_least("dataset.examples", config.examples, 1)
        check_at_most("dataset.examples", config.examples, MAX_EXAMPLES)
        if (config.source, config.target) not in sentences.DIRECTIONS:
            allowed = " or ".join(" to ".join(each) for each in sentences.DIRECTIONS)
            raise UserError(f"dataset={GENERATED} has {allowed}, not {config.source} to {config.target}")
    if config.vocabulary is None:
        raise UserError(f"dataset.vocabulary is not given, and dataset={config.name} needs it")
    check_at_least("dataset.vocabulary", config.vocabulary, FEWEST)
    check_at_least("dataset.max_length", config.max_length, 8)
    check_at_most("dataset.max_length", config.max_length, MAX_LENGTH)
    if config.batch_tokens < config.max_length:
        least = f"dataset.max_length={config.max_length}, the longest sentence"
        raise UserError(f"dataset.batch_tokens={config.batch_tokens} is too small; it must be at least {least}")


@dataclass(frozen=True)
class TranslationData:
    """What luqrun.tasks.task.Data wants, and of validation and test what the scores need.

    references: by split, the translations in the order of the file. order: by split, which line of the file the
    examples are, sorted by length, so that a batch has little padding. of, left_out: training pairs there are before
    dataset.limit; and what was too long, in words.
    """

    train: BucketedPairs
    val: SentencePairs
    test: SentencePairs | None
    subwords: Subwords
    references: dict[str, list[str]]
    order: dict[str, np.ndarray]
    languages: tuple[str, str]
    of: int
    left_out: str = ""
    fingerprint: dict[str, object] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return {"vocabulary": len(self.subwords)}

    def describe(self) -> str:
        """Such as "29,000 training, 1,014 validation and 1,000 test sentences, en to de, 10,000 subwords"."""
        of = f" of {self.of:,}" if self.of != len(self.train) else ""
        test = f" and {len(self.test):,} test" if self.test is not None else ""
        pairs = f"{len(self.train):,}{of} training, {len(self.val):,} validation{test} sentences"
        padding = describe_padding(self.train, self.train.source.lengths, self.train.target.lengths)
        about = f"{' to '.join(self.languages)}, {len(self.subwords):,} subwords, {padding}"
        return f"{pairs}, {about}" + (f"; {self.left_out}" if self.left_out else "")


def fingerprint_dataset(config: DatasetConfig) -> dict[str, object]:
    """As luqrun.tasks.fingerprint_data; {} for sentences that are generated."""
    check_choice("dataset.name", config.name, NAMES)
    return {} if config.name == GENERATED else parallel_text.fingerprint(config)


def build_dataset(config: DatasetConfig, subwords: Subwords | None = None) -> TranslationData:
    """The data set that `config` names. Raises UserError naming the key, or the file and line, that is wrong.

    subwords: None: they are learnt from the training text.
    Training pairs with a side longer than dataset.max_length are left out; of validation and test the source is cut.
    """
    validate_dataset(config)
    if config.name == GENERATED:
        texts = sentences.generate(config.examples, (config.source, config.target))
    else:
        files = parallel_text.find_files(config)
        texts = {split: parallel_text.read_pairs(*paths) for split, paths in files.items()}
    subwords = subwords or subwords_of(texts["train"], config.vocabulary)
    of = len(texts["train"].source)
    chosen = subset(of, config.limit, "sentences")
    texts["train"] = Pairs(*([side[index] for index in chosen] for side in texts["train"]))
    encoded = {split: [subwords.encode(side) for side in pairs] for split, pairs in texts.items()}
    source, target = encoded.pop("train")
    kept = np.flatnonzero(np.maximum(source.lengths, target.lengths) <= config.max_length)
    if not len(kept):
        raise UserError(f"no training sentence has at most dataset.max_length={config.max_length} subwords")
    too_long = len(source) - len(kept)
    notes = [f"left out: {too_long:,} training pairs of more than {config.max_length} subwords"] if too_long else []
    evaluated, order = {}, {}
    for split, sides in encoded.items():
        cut = int((sides[0].lengths > config.max_length).sum())
        notes += [f"cut to {config.max_length} subwords: {cut:,} {split} sentences"] if cut else []
        sides = [side.cut(config.max_length) for side in sides]  # the target's loss alone; scores take the text
        order[split] = sides[0].lengths.argsort(kind="stable")
        evaluated[split] = SentencePairs(*(side.select(order[split]) for side in sides))
    return TranslationData(
        train=BucketedPairs(source.select(kept), target.select(kept), config.batch_tokens),
        val=evaluated["val"],
        test=evaluated.get("test"),
        subwords=subwords,
        references={split: pairs.target for split, pairs in texts.items() if split != "train"},
        order=order,
        languages=(config.source, config.target),
        of=of,
        left_out="; ".join(notes),
        fingerprint=fingerprint_dataset(config),
    )
