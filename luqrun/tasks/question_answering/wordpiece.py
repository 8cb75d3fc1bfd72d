"""The tokenizer: WordPiece, lower-cased, as BERT's; trained on the training text, or read from a folder of weights."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from luqrun.errors import UserError
from luqrun.internals.of_transformers import tokenizers
from luqrun.tasks.cache import cached_text
from luqrun.tasks.question_answering.windows import SPECIAL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "[UNK]"
TOKENS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
PREFIX = "##"  # of what goes on in a word
MAX_CHARACTERS = 1000  # the most frequent ones
TRAINING = 1  # part of the cache key: raise it when the training changes


def trained(texts: Sequence[str], size: int) -> Tokenizer:
    """A tokenizer of at most `size` subwords (but all characters), from the cache if these texts have been seen: always
    the same one."""
    key = hashlib.sha256(json.dumps([TRAINING, tokenizers().__version__, size]).encode())
    for text in texts:
        key.update(hashlib.sha256(text.encode()).digest())
    name = f"wordpiece-{key.hexdigest()[:16]}.json"
    return cached_text(name, tokenizers().Tokenizer.from_str, lambda: train(texts, size).to_str())


def train(texts: Sequence[str], size: int) -> Tokenizer:
    """The same tokenizer for the same texts: the library's trainer alone numbers characters as they come out of a hash
    table, and merges other pairs each time. So each has its number before."""
    library, counts = tokenizers(), Counter()
    normalizer = library.normalizers.BertNormalizer()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:MAX_CHARACTERS]
    characters = sorted(character for character in frequent if not character.isspace())
    known = [*TOKENS, *characters, *(PREFIX + character for character in characters)]
    trainer = library.trainers.WordPieceTrainer(
        vocab_size=max(size, len(known)),
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        special_tokens=known,
        continuing_subword_prefix=PREFIX,
        show_progress=False,
    )
    raw = _tokenizer({}, lower_case=True)
    raw.train_from_iterator(texts, trainer)
    return _tokenizer(raw.get_vocab(), lower_case=True)


def _tokenizer(vocabulary: dict[str, int], lower_case: bool) -> Tokenizer:
    library = tokenizers()
    tokenizer = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=lower_case)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = library.decoders.WordPiece(prefix=PREFIX)
    if vocabulary:
        tokenizer.add_special_tokens([token for token in TOKENS if token in vocabulary])
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        ids = [(token, vocabulary[token]) for token in SPECIAL[:2]]
        template = library.processors.TemplateProcessing
        tokenizer.post_processor = template(single=single, pair=pair, special_tokens=ids)
    return tokenizer


def read(folder: Path, vocabulary_size: int) -> Tokenizer:
    """The tokenizer of a folder of weights whose embedding has `vocabulary_size` rows: of its tokenizer.json, or its
    vocab.txt. Raises UserError naming the file."""
    whole, lines = folder / "tokenizer.json", folder / "vocab.txt"
    path = whole if whole.is_file() else lines
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = tokenizers().Tokenizer.from_str(text) if path == whole else _of_lines(text, folder)
    except FileNotFoundError:
        raise UserError(f"model.weights={folder}: neither tokenizer.json nor vocab.txt is there") from None
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path} is no tokenizer ({' '.join(str(error).split())[:100]})") from None
    missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"{path} is not a BERT's vocabulary: it has no {', '.join(missing)}")
    if (needed := max(tokenizer.get_vocab().values()) + 1) > vocabulary_size:
        raise UserError(f"{path} has {needed} tokens, the network's embedding {vocabulary_size}: they do not belong")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _of_lines(text: str, folder: Path) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(text.split("\n")) if token}
    missing = [token for token in (*SPECIAL, UNKNOWN) if token not in vocabulary]
    if missing:
        raise UserError(f"{folder / 'vocab.txt'} is not a BERT's vocabulary: it has no {', '.join(missing)}")
    settings = folder / "tokenizer_config.json"
    lower_case = True
    if settings.is_file():
        lower_case = json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case", True) is not False
    return _tokenizer(vocabulary, lower_case)
