"""Data sets of questions by name, and what is allowed for them. Nothing heavy is imported before one is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luqrun.config import Config, DatasetConfig, ModelConfig
from luqrun.errors import UserError, check_at_least, check_at_most, check_choice
from luqrun.runs.folder import TOKENIZER
from luqrun.runs.weights import OF_TEXT, is_file
from luqrun.runs.weights import fingerprint_weights as fingerprint_file
from luqrun.tasks.padding import describe_padding
from luqrun.tasks.question_answering import GENERATED, NAMES
from luqrun.tasks.settings import check_common, check_read, check_text_model
from luqrun.tasks.subset import subset

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from luqrun.tasks.question_answering.questions import QuestionSet
    from luqrun.tasks.question_answering.windows import BatchedWindows, Windows

READ = ("max_length", "stride", "vocabulary")  # of dataset.*, beside what all data sets read
MAX_EXAMPLES = 1_000_000
MAX_VOCABULARY = 1_000_000
VOCABULARY = 30522  # BERT's
POSITIONS = 512
WITH_WEIGHTS = "bert"  # the network that may start from a folder of weights
# Of random weights. The small network draws them as wide for its width as BERT does, and is for generated data.
NETWORKS = {
    "bert": {
        **{"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        **{"max_position_embeddings": POSITIONS, "initializer_range": 0.02, "dropout": 0.1},
    },
    "bert_tiny": {
        **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512},
        **{"max_position_embeddings": POSITIONS, "initializer_range": 0.05, "dropout": 0.0},
    },
}


@dataclass(frozen=True)
class QuestionData:
    """Windows of questions. of: training questions there are, before dataset.limit."""

    train: BatchedWindows
    val: Windows
    of: int
    vocabulary_size: int
    fingerprint: dict[str, object] = field(default_factory=dict)
    test: None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Of the network, for checkpoints."""
        return {"vocab_size": self.vocabulary_size}

    def describe(self) -> str:
        """Such as "800 of 4,370 training questions in 810 windows, and 2,910 validation questions in 2,950 windows"."""
        counts = [(len(part.of.questions), len(part)) for part in (self.train, self.val)]
        of = f" of {self.of:,}" if self.of != counts[0][0] else ""
        cut = f"; {self.train.cut + self.val.cut} questions are cut" if self.train.cut + self.val.cut else ""
        shown = f"{counts[0][0]:,}{of} training questions in {counts[0][1]:,} windows, and "
        padding = describe_padding(self.train, self.train.lengths)
        return f"{shown}{counts[1][0]:,} validation questions in {counts[1][1]:,} windows; {padding}{cut}"


def validate_model(model: ModelConfig, dataset: str) -> None:
    """Raise UserError naming the first key under `model` that is not allowed; no file is looked at."""
    if model.name not in NETWORKS:
        allowed = ", ".join(NETWORKS)
        raise UserError(
            f"model.name={model.name} does not answer questions, as dataset={dataset} asks; allowed: {allowed}"
        )
    check_text_model(model)
    if model.weights is not None and not is_file(model.weights) and model.name != WITH_WEIGHTS:
        raise UserError(
            f"a folder as model.weights is read by model={WITH_WEIGHTS}, which has their sizes then, not by "
            f"{model.name}"
        )


def validate_dataset(config: DatasetConfig, weights: str | None) -> None:
    """Raise UserError naming the first key under `dataset` whose value is not allowed; no file is looked at."""
    check_choice("dataset.name", config.name, NAMES)
    check_common(config)
    check_read(config, (*READ, "examples") if config.name == GENERATED else (*READ, "root"))
    for key, least in (("max_length", 8), ("stride", 0)):
        check_at_least(f"dataset.{key}", getattr(config, key), least)
    if config.stride >= config.max_length:
        raise UserError(f"dataset.stride={config.stride} must be less than dataset.max_length={config.max_length}")
    if weights is None and config.max_length > POSITIONS:
        raise _too_long(config.max_length, POSITIONS)
    if config.vocabulary is not None:
        check_at_least("dataset.vocabulary", config.vocabulary, 100)
        check_at_most("dataset.vocabulary", config.vocabulary, MAX_VOCABULARY)
        if weights is not None:
            raise UserError(
                f"dataset.vocabulary={config.vocabulary} is not read with model.weights, which have their own"
            )
    if config.name == GENERATED:
        check_at_least("dataset.examples", config.examples, 1)
        check_at_most("dataset.examples", config.examples, MAX_EXAMPLES)


def _too_long(max_length: int, positions: int) -> UserError:
    return UserError(f"dataset.max_length={max_length} is more than the {positions} positions of the network")


def fingerprint_dataset(config: Config) -> dict[str, object]:
    """As luqrun.tasks.fingerprint_data. Raises UserError as `build_dataset` does."""
    check_choice("dataset.name", config.dataset.name, NAMES)
    found = {}
    if config.dataset.name == "squad":
        from luqrun.tasks.question_answering import squad

        found |= squad.fingerprint(config.dataset)
    if is_file(config.model.weights):
        found["weights"] = fingerprint_file(config.model.weights, OF_TEXT)
    elif config.model.weights is not None:
        from luqrun.tasks.question_answering.weights import fingerprint_weights

        found["weights"] = fingerprint_weights(config.model.weights)
    return found


def build_dataset(config: Config) -> tuple[QuestionData, Tokenizer]:
    """The data set that `config` names, in the tokens of model.weights or else of a tokenizer that is trained on its
    training text: the same, and the same subset of `dataset.limit`, in every run.

    Raises UserError naming the key, the file or the question that is wrong.
    """
    from luqrun.tasks.question_answering import wordpiece
    from luqrun.tasks.question_answering.weights import home_of, read_settings, sizes_folder
    from luqrun.tasks.question_answering.windows import BatchedWindows, Windows, chosen

    dataset, known = config.dataset, fingerprint_dataset(config)
    home, sizes = home_of(config.model.weights), sizes_folder(config.model.weights)
    settings = {"max_position_embeddings": POSITIONS} if sizes is None else read_settings(sizes)
    if dataset.max_length > settings["max_position_embeddings"]:
        raise _too_long(dataset.max_length, settings["max_position_embeddings"])
    if home is None or (sizes is None and not (home / TOKENIZER).is_file()):
        train, val = _questions(dataset)
        tokenizer = wordpiece.trained(_texts(train), dataset.vocabulary or VOCABULARY)
    else:
        tokenizer = wordpiece.read(home, settings.get("vocab_size", MAX_VOCABULARY))
        train, val = _questions(dataset)
    size = settings.get("vocab_size", tokenizer.get_vocab_size())
    kept = train if dataset.limit is None else chosen(train, subset(len(train.questions), dataset.limit, "questions"))
    cut = dataset.max_length, dataset.stride
    windows = BatchedWindows(kept, tokenizer, *cut, dataset.batch_size), Windows(val, tokenizer, *cut)
    return QuestionData(*windows, len(train.questions), size, known), tokenizer


def _questions(config: DatasetConfig) -> tuple[QuestionSet, QuestionSet]:
    if config.name == "squad":
        from luqrun.tasks.question_answering import squad

        return squad.read(config)
    from luqrun.tasks.question_answering import facts

    return facts.draw(config.examples, 0), facts.draw(facts.VAL_QUESTIONS, 1)


def _texts(of: QuestionSet) -> list[str]:
    return [*of.contexts, *(question.text for question in of.questions)]
