"""A folder of weights in the Hugging Face layout: config.json, model.safetensors, tokenizer.json or vocab.txt.

Only safetensors are read, which hold numbers alone: a pickle, as pytorch_model.bin is, can run code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from luqrun.errors import UserError
from luqrun.runs.weights import SETTINGS, beside, find_file, is_file
from luqrun.tasks.fingerprint import hash_of

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
TEXTS = (SETTINGS, "tokenizer.json", "vocab.txt", "tokenizer_config.json")
MAX_HEADER = 100 << 20  # bytes, as in safetensors
SAMPLES, SAMPLE = 64, 4096  # pieces of the weights, of that many bytes, that the fingerprint knows

SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "type_vocab_size"),
)
MAX_SIZE = 10_000_000


def weights_folder(weights: str) -> Path:
    """model.weights as a folder that has what is read. Raises UserError naming what is not there."""
    folder = Path(os.path.expanduser(weights))
    if not folder.is_dir():
        raise UserError(f"model.weights={weights}: there is no such folder")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            why = f"its {PICKLE} is a pickle, which can run code, and is not read"
            raise UserError(f"model.weights={weights}: there is no {WEIGHTS}; {why}")
        raise UserError(f"model.weights={weights}: there is no {WEIGHTS}; expected {SETTINGS}, {WEIGHTS}, {TEXTS[1]}")
    if not (folder / SETTINGS).is_file():
        raise UserError(f"model.weights={weights}: there is no {SETTINGS}")
    return folder


def home_of(weights: str | None) -> Path | None:
    """The folder that holds what belongs to model.weights: itself, or what lies around a file of weights; None without.
    Raises UserError where a folder, or the file, is not there."""
    if weights is None:
        return None
    return beside(find_file(weights)) if is_file(weights) else weights_folder(weights)


def sizes_folder(weights: str | None) -> Path | None:
    """The folder whose config.json says what sizes the network has; None where model.name says it: without
    model.weights, or with a file that has none beside it."""
    home = home_of(weights)
    return home if home is not None and (home / SETTINGS).is_file() else None


def fingerprint_weights(weights: str) -> str:
    """A hash of the texts of the folder, and of the names, shapes, size and a sample of its weights: not of where it
    lies."""
    folder = weights_folder(weights)
    parts = []
    for name in TEXTS:
        if (folder / name).is_file():
            parts += [name.encode(), _bytes(folder / name)]
    path = folder / WEIGHTS
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = 8 + _header_length(file.read(8), size, path)
            file.seek(0)
            parts += [str(size).encode(), file.read(begin)]
            for number in range(SAMPLES):
                file.seek(begin + (size - begin) * number // SAMPLES)
                parts.append(file.read(SAMPLE))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    return hash_of(parts)


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the stored tensors, by name. Raises UserError for a file that is not safetensors."""
    path = folder / WEIGHTS
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_header_length(file.read(8), path.stat().st_size, path)))
        return {name: tuple(map(int, each["shape"])) for name, each in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not a file of safetensors: its header is damaged") from None


def _header_length(start: bytes, size: int, path: Path) -> int:
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise UserError(f"{path} is not a file of safetensors, or was cut off")
    return length


def read_settings(folder: Path) -> dict[str, object]:
    """config.json of a BERT: its sizes are there, and are integers of at least 1. Raises UserError naming the key."""
    path = folder / SETTINGS
    try:
        found = json.loads(_bytes(path).decode())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold keys, such as hidden_size")
    kinds = found.get("architectures")
    kind = found.get("model_type", kinds[0] if isinstance(kinds, list) and kinds else "nothing it names")
    if not (kind == "bert" or ("model_type" not in found and str(kind).startswith("Bert"))):
        raise UserError(f"{path} is of a network of the kind {kind}; allowed: bert")
    found.setdefault("type_vocab_size", 2)
    for key in SIZES:
        value = found.get(key)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise UserError(f"{path}: {key}={value} must be an integer of at least 1 and at most {MAX_SIZE}")
    if found["hidden_size"] % found["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size must be a multiple of num_attention_heads")
    if found["type_vocab_size"] < 2:
        raise UserError(f"{path}: type_vocab_size=1, but question and context are told apart by 2 types")
    if found.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{path}: position_embedding_type={found['position_embedding_type']} is not known; absolute is")
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
