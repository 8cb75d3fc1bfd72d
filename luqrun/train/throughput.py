"""How fast a run trains: over all of it, and lately."""

from __future__ import annotations

START = {"seconds": 0.0, "images": 0, "timed_seconds": 0.0, "timed_images": 0}  # of a progress


class Speed:
    """Counts seconds and images of training steps into `progress`, a part of the checkpoint.

    The first step of a process warms up: it is part of the time, unless torch.compile `compiles` in it, not of the
    speed.
    """

    def __init__(self, progress: dict, compiles: bool = False):
        self.progress, self.compiles, self.warm = progress, compiles, False
        self.lately_seconds, self.lately_images = 0.0, 0

    def count(self, seconds: float, images: int) -> None:
        """Count one step."""
        self.progress["seconds"] += seconds if self.warm or not self.compiles else 0.0
        self.progress["images"] += images
        self.lately_seconds += seconds
        self.lately_images += images
        if self.warm:
            self.progress["timed_seconds"] += seconds
            self.progress["timed_images"] += images
        self.warm = True

    def mean(self) -> float:
        """Images a second of the whole run; 0 while only first steps were done."""
        seconds = self.progress["timed_seconds"]
        return self.progress["timed_images"] / seconds if seconds else 0.0

    def lately(self) -> float:
        """Images a second of the steps since it was asked last; there was one at least."""
        found = self.lately_images / self.lately_seconds
        self.lately_seconds, self.lately_images = 0.0, 0
        return found
