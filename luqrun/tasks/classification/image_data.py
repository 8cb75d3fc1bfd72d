"""What a data set of images is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luqrun.tasks.task import Examples


@dataclass(frozen=True)
class ImageData:
    """A training and a validation set of images (channels, image_size, image_size) in the same classes.

    fingerprint: of the files that they were read from (luqrun.tasks.fingerprint_data); {} for images that were drawn.
    of: training images there are, before dataset.limit; left_out: what was no image, in words.
    """

    train: Examples
    val: Examples
    classes: tuple[str, ...]
    channels: int
    image_size: int
    fingerprint: dict[str, object] = field(default_factory=dict)
    of: int | None = None
    left_out: str = ""
    test: None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Of the network, for checkpoints."""
        return {"num_classes": len(self.classes)}

    def describe(self) -> str:
        """Such as "10,000 training and 4,000 validation images of 94 classes"."""
        of = f" of {self.of:,}" if self.of not in (None, len(self.train)) else ""
        left_out = f"; left out: {self.left_out}" if self.left_out else ""
        images = f"{len(self.train):,}{of} training and {len(self.val):,} validation images"
        return f"{images} of {len(self.classes):,} {'class' if len(self.classes) == 1 else 'classes'}{left_out}"
