"""How fast a run trains: over all of it, and lately."""

from __future__ import annotations

START = {"seconds": 0.0, "trained": 0, "timed_seconds": 0.0, "timed": 0}  # of a progress


class Throughput:
    """Counts seconds of training steps, and the examples or tokens they trained on, into `progress`, a part of the
    checkpoint.

    The first step of a process warms up: it is part of the time, not of the speed. A step in which torch.compile was at
    work is part of neither.
    """

    def __init__(self, progress: dict):
        self.progress, self.warm = progress, False
        self.recent_seconds, self.recent = 0.0, 0

    def count(self, seconds: float, trained: int, compiled: bool = False) -> None:
        """Count one step."""
        self.progress["seconds"] += 0.0 if compiled else seconds
        self.progress["trained"] += trained
        self.recent_seconds += seconds
        self.recent += trained
        if self.warm and not compiled:
            self.progress["timed_seconds"] += seconds
            self.progress["timed"] += trained
        self.warm = True

    def mean(self) -> float:
        """Examples (tokens) a second of the whole run; 0 while only first steps were done."""
        seconds = self.progress["timed_seconds"]
        return self.progress["timed"] / seconds if seconds else 0.0

    def take_recent(self) -> float:
        """Examples (tokens) a second of the steps since it was asked last; there was one at least."""
        rate = self.recent / self.recent_seconds
        self.recent_seconds, self.recent = 0.0, 0
        return rate
