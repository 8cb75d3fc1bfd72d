"""hydra.sweeper.storage, where Optuna keeps a search: made ready, or refused in one line, before the sweep begins.

hydra-optuna-sweeper wants Optuna 2, which leaves the writes that set up a database to a commit that SQLAlchemy did by
itself up to version 1.4. Set up over a connection that commits each write, it works with SQLAlchemy 2, too.
"""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version

from omegaconf import DictConfig

from luqrun.errors import UserError


def prepare(config: DictConfig) -> None:
    """Set up the database that the sweep of this config names. Raises UserError naming hydra.sweeper.storage."""
    storage = config.hydra.sweeper.get("storage")
    if "optuna" not in str(config.hydra.sweeper._target_).lower() or not isinstance(storage, str):
        return
    if storage.startswith("redis"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy's, of names that Optuna 2 uses and that have moved
        from optuna.storages import RDBStorage

        try:
            ready = RDBStorage(storage, engine_kwargs={"isolation_level": "AUTOCOMMIT"})
            ready.remove_session()
            ready.engine.dispose()
        except Exception as error:  # any of the database driver's
            shown = re.sub("//[^@/]*@", "//***@", storage)
            reason = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
            versions = f"Optuna {version('optuna')}, SQLAlchemy {version('SQLAlchemy')}"
            raise UserError(
                f"hydra.sweeper.storage={shown} cannot be used ({reason}; {versions}); such as sqlite:///search.db"
            ) from None
