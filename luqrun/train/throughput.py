"""How fast a run trains: over all of it, and lately."""

from __future__ import annotations

from luqrun.runs.durations import in_words

START = {"seconds": 0.0, "trained": 0, "timed_seconds": 0.0, "timed": 0}  # of a progress


class Throughput:
    """Counts seconds of training steps, and the examples or tokens they trained on, into `progress`, a part of the
    checkpoint.

    The first step of a process warms up: it is part of the time, not of the speed. A step in which torch.compile was at
    work, or during which kernels were compiled, is part of neither.
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

    def seconds_left(self, steps: int, evaluations: int) -> float | None:
        """What that many steps and evaluations more will take, as long as those so far; None while that is not known.

        Before the first evaluation these count nothing.
        """
        if not self.mean():
            return None
        step = self.progress["trained"] / self.progress["step"] / self.mean()
        done = len(self.progress["evaluations"])
        return steps * step + (evaluations * self.progress["evaluation_seconds"] / done if done else 0.0)

    def describe(self, unit: str, steps: int, evaluations: int) -> str:
        """Such as "812 images/s, 12 min left", of that many steps and evaluations to come."""
        left = self.seconds_left(steps, evaluations)
        return f"{self.mean():.0f} {unit}/s" + (f", {in_words(left)} left" if left else "")

    def take_recent(self) -> float:
        """Examples (tokens) a second of the steps since it was asked last; there was one at least."""
        rate = self.recent / self.recent_seconds
        self.recent_seconds, self.recent = 0.0, 0
        return rate
