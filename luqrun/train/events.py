"""A file of TensorBoard events whose name and times never go back, whatever the clock does.

TensorBoard reads a folder's files in the order of their names, which begin with a time, and takes an event that is
older than the ones before it for one of a run that was started over. torch's SummaryWriter asks the clock for both.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

_numbers = itertools.count()  # of this process' files
_TIME = re.compile(r"events\.out\.tfevents\.(\d+)\.")


class EventFile:
    """Writes one file in `folder`, named to be read after those that are there.

    after: seconds since 1970, before which no event may be. purge: TensorBoard forgets what it has read of this step
    and later ones. Raises OSError, at any call, where the disk does not take it.
    """

    def __init__(self, folder: Path, after: float = 0.0, purge: int = 0):
        now = time.time()
        self.ahead, self.latest = max(after - now, 0.0), after
        names = (_TIME.match(path.name) for path in folder.glob("events.out.tfevents.*"))
        newest = max((int(name[1]) for name in names if name), default=-1)
        number = max(int(now + self.ahead), newest + 1)
        host = re.sub(r"[^\w-]", "_", platform.node())
        self.path = folder / f"events.out.tfevents.{number:010d}.{host}.{os.getpid()}.{next(_numbers)}"
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def add(self, summary: Summary, step: int | None = None) -> None:
        """Write a summary, as torch.utils.tensorboard.summary makes them."""
        self._write(Event(summary=summary, step=step))

    def _write(self, event: Event) -> None:
        # The clock can be set back while the run lasts, too.
        self.latest = event.wall_time = max(time.time() + self.ahead, self.latest)
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Bring what was written to disk."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()
