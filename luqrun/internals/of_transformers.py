"""How transformers, and what comes with it for text, is loaded: on first use, and without ever asking a network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

from luqrun.errors import UserError

PACKAGES = ("transformers", "tokenizers", "sacrebleu")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_THREADS = "TOKENIZERS_PARALLELISM"


def transformers() -> ModuleType:
    """The package transformers, offline and quiet: it shows neither progress bars nor warnings.

    Raises UserError where it, tokenizers or sacrebleu is not installed.
    """
    missing = [name for name in PACKAGES if not _is_there(name)]
    if missing:
        raise UserError(f"{', '.join(missing)} not found: text needs the extra text: pip install 'luqrun[text]'")
    if "transformers" not in sys.modules:  # they are read when it is imported
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    if _THREADS not in os.environ:  # else tokenizers complains of each process that is forked, such as a loader's
        os.environ[_THREADS] = "true"
        os.register_at_fork(after_in_child=_tokenize_in_one_thread)
    module = importlib.import_module("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def _is_there(name: str) -> bool:
    return sys.modules.get(name) is not None or (name not in sys.modules and importlib.util.find_spec(name) is not None)


def _tokenize_in_one_thread() -> None:
    """The threads of the parent are not there in a process that was forked, and would be waited for."""
    os.environ[_THREADS] = "false"
