"""Joint subwords of two languages: byte-pair encoding, learnt from the training text by Hugging Face's tokenizers.

A subword that begins a word has a mark; punctuation is apart. Decoding gives plain text again, as sacrebleu wants it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from luqrun.errors import UserError
from luqrun.internals.of_transformers import tokenizers
from luqrun.tasks.cache import cached_text
from luqrun.tasks.translation.parallel_text import Pairs
from luqrun.tasks.translation.ragged import Ragged

PADDING, END, UNKNOWN = 0, 1, 2  # padding also begins what a decoder reads, as in Marian
SPECIAL = ("<pad>", "</s>", "<unk>")
CHUNK = 100_000  # lines at a time: what the library makes of them takes much more memory than is kept
FEWEST = 100  # subwords that dataset.vocabulary must at least ask for


class Subwords:
    """Text to subwords and back; `json` is the tokenizer as its library writes it."""

    def __init__(self, content: str):
        self.json = content
        self._tokenizer = tokenizers().Tokenizer.from_str(content)
        self._tokenizer.encode_special_tokens = True  # "<pad>" in a text is text

    @classmethod
    def read(cls, path: Path) -> Subwords:
        """Those of a file that a run has kept. Raises UserError naming it."""
        try:
            found = cls(path.read_text(encoding="utf-8"))
            known = [found._tokenizer.token_to_id(token) for token in SPECIAL]
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{path} is no tokenizer ({' '.join(str(error).split())[:100]})") from None
        if known != [PADDING, END, UNKNOWN]:
            raise UserError(f"{path} is no tokenizer of a translation here: {', '.join(SPECIAL)} do not come first")
        return found

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, lines: Sequence[str]) -> Ragged:
        """The subwords of each line, END after them."""
        parts = [self._encode(lines[first : first + CHUNK]) for first in range(0, len(lines), CHUNK)]
        return Ragged.joined(parts) if parts else Ragged.of([])

    def _encode(self, lines: Sequence[str]) -> Ragged:
        found = self._tokenizer.encode_batch_fast(list(lines), add_special_tokens=False)
        return Ragged.of([*each.ids, END] for each in found)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Plain text of each list of subwords, up to its END, with single spaces between words."""
        cut = [list(itertools.takewhile(lambda one: one != END, (int(each) for each in line))) for line in ids]
        return [" ".join(text.split()) for text in self._tokenizer.decode_batch(cut, skip_special_tokens=True)]


def subwords_of(train: Pairs, vocabulary: int) -> Subwords:
    """The subwords of a training text, both languages together, from the user's cache where they are.

    vocabulary: how many at most; a small text has fewer.
    """
    key = hashlib.sha256(json.dumps([tokenizers().__version__, vocabulary, len(train.source)]).encode())
    for side in train:
        for first in range(0, len(side), CHUNK):
            key.update("\n".join([*side[first : first + CHUNK], ""]).encode())
    return cached_text(f"subwords-{key.hexdigest()[:16]}.json", Subwords, lambda: _learn(train, vocabulary))


def _learn(train: Pairs, vocabulary: int) -> str:
    library = tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=SPECIAL[UNKNOWN], fuse_unk=True))
    tokenizer.normalizer = library.normalizers.NFC()
    parts = [library.pre_tokenizers.Metaspace(prepend_scheme="always"), library.pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(parts)
    tokenizer.decoder = library.decoders.Metaspace(prepend_scheme="always")
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(itertools.chain(train.source, train.target), trainer)
    return tokenizer.to_str()
