"""A file of weights (model.weights): safetensors, what torch.save wrote of tensors alone, or a run's checkpoint."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from luqrun.errors import UserError
from luqrun.runs import checkpoint
from luqrun.runs.folder import TOKENIZER

KEY = "model.weights"
KINDS = "safetensors, a state_dict that torch.save wrote, or a run's checkpoints/last.pt"
WITHIN = ("state_dict", "model", "model_state_dict", "net")  # where training scripts keep the state_dict
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
SETTINGS = "config.json"  # of a network for text
OF_TEXT = (TOKENIZER, SETTINGS)  # what networks for text read beside a file of weights
ADVICE = f"{KEY} takes {KINDS}"
# Of the metadata of an export (luqrun.report.export): how its codes are read, and the settings that decided the run.
PACKED, SETTINGS_OF_RUN = "luqrun.packed", "luqrun.settings"


@dataclass(frozen=True)
class Weights:
    """Tensors by name. settings: what decided the run whose checkpoint the file is; None of another file."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict | None = None

    @property
    def origin(self) -> str:
        """Such as "model.name=resnet8, dataset.name=glyphs, quant.name=luq"; "" where it is not known."""
        names = ((part, self._name(part)) for part in ("model", "dataset", "quant"))
        return ", ".join(f"{part}.name={name}" for part, name in names if name is not None)

    @property
    def recipe(self) -> str | None:
        """The name of the recipe that trained them, where it is known."""
        return self._name("quant")

    def _name(self, part: str) -> str | None:
        found = (self.settings or {}).get(part)
        return found.get("name") if isinstance(found, dict) else None


def is_file(weights: str | None) -> bool:
    """Whether model.weights means a file: not a folder in the Hugging Face layout, of which tasks for text know."""
    return weights is not None and not os.path.isdir(os.path.expanduser(weights))


def find_file(weights: str) -> Path:
    """model.weights as a path: of a file, or a pattern that one file fits, such as outputs/a/*-seed0-*/*/last.pt.

    Raises UserError where there is none, or more than one.
    """
    path = Path(os.path.expanduser(weights))
    if path.is_file():
        return path
    if path.is_dir():
        last = path / "checkpoints" / checkpoint.LAST
        instead = f"its checkpoint is {last}" if last.is_file() else ADVICE
        raise UserError(f"{KEY}={weights} is a folder, not a file; {instead}")
    found = sorted(glob.glob(str(path)))
    if not found:
        raise UserError(f"{KEY}={weights}: there is no such file or folder; {ADVICE}")
    if len(found) > 1:
        more = f" and {len(found) - 2} more" if found[2:] else ""
        raise UserError(f"{KEY}={weights} fits {len(found)} files, {found[0]}, {found[1]}{more}; it must fit one")
    return Path(found[0])


def beside(path: Path) -> Path:
    """The folder that holds what belongs to a file of weights: its own, or of a checkpoint the run's."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def fingerprint_weights(weights: str, read_beside: tuple[str, ...] = ()) -> str:
    """16 hex digits of a hash of the file's content, and of those files beside it that are read too, where they are
    there."""
    path, whole = find_file(weights), hashlib.sha256()
    for each in (path, *(beside(path) / name for name in read_beside)):
        if each == path or each.is_file():
            try:
                with each.open("rb") as file:
                    whole.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UserError(f"{each} cannot be read ({error.strerror})") from None
    return whole.hexdigest()[:16]


def read_weights(weights: str) -> Weights:
    """The tensors of the file that model.weights means, on the CPU. No code in it is run.

    Raises UserError naming the file: for one that is damaged, holds other things than tensors, is an export of packed
    codes, or a checkpoint of an earlier luqrun.
    """
    path, settings = find_file(weights), None
    if path.suffix == ".safetensors":
        tensors, settings = _read_safetensors(path)
    elif checkpoint.is_checkpoint(path):
        content = checkpoint.read(path, ADVICE)
        tensors, settings = content["model"], content["identity"].get("settings")
    else:
        tensors = _state_dict(_read_pickle(path), path)
    for prefix in (*PREFIXES, *PREFIXES):  # either may be inside the other
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Weights(path, tensors, settings)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors; and of an export, what decided the run."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if PACKED in metadata:
                raise UserError(
                    f"{path} holds packed codes, from which no training starts; {KEY} takes what luqrun-export --full "
                    "writes of the run, or its checkpoints/last.pt"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        why = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is cut off, or not a file of safetensors ({why}); {ADVICE}") from None
    try:
        settings = json.loads(metadata[SETTINGS_OF_RUN]) if SETTINGS_OF_RUN in metadata else None
    except (ValueError, RecursionError):
        settings = None
    return tensors, settings if isinstance(settings, dict) else None


def _read_pickle(path: Path) -> object:
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except Exception as error:  # whatever the unpickler, or the reader of the archive, says
        text = str(error)
    if found := re.search(r"(?:GLOBAL|global) ([\w.]+)", text):
        raise UserError(
            f"{path} holds Python objects beside tensors ({found[1]}), which can run code, and is not read; save the "
            "state_dict alone, or as safetensors"
        )
    if _starts_as_pickle(path):
        raise UserError(
            f"{path} is cut off, or a pickle that torch.save did not write, which can run code: it is not read; "
            f"{ADVICE}"
        )
    if "TorchScript" in text:
        raise UserError(f"{path} is a TorchScript archive, which holds code, and is not read; save its state_dict")
    raise UserError(f"{path} is cut off, or not a file of torch.save; {ADVICE}")


def _starts_as_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict) and content.keys() >= checkpoint.EVER and isinstance(content["progress"], dict):
        raise UserError(
            f"{path} is a damaged checkpoint of luqrun, or one of an earlier luqrun (version {content['version']} of "
            f"checkpoints, here it is {checkpoint.VERSION}): its checksum is not there; {ADVICE}"
        )
    inner = content
    if isinstance(content, dict):
        inner = next((content[name] for name in WITHIN if isinstance(content.get(name), dict)), content)
    if not isinstance(inner, dict) or not inner:
        raise UserError(f"{path} holds a {type(content).__name__} and no state_dict; {ADVICE}")
    for name, value in inner.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{path} holds no state_dict: {name} is a {type(value).__name__}; {ADVICE}")
    return dict(inner)
