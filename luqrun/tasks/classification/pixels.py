"""Images as uint8 pixels, served in batches: what the in-memory sets and the class folders share.

A batch is asked for with one 64-bit key an image. All random choices of the augmentation follow from the key, so the
same key gives the same pixels whichever process serves it, and in whatever batch.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from luqrun.tasks.examples import seeded


class Images(Dataset):
    """Base: subclasses say how uint8 pixels are read and augmented, this class counts, labels and normalises.

    labels: int64 (count,). mean, std: one number a channel, in units where white is 1.
    """

    def __init__(self, labels, mean: Sequence[float], std: Sequence[float], augment: bool = False):
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.mean = 255 * np.array(mean, np.float32).reshape(-1, 1, 1)
        self.scale = 1 / (255 * np.array(std, np.float32).reshape(-1, 1, 1))
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One image, augmented (if it is) by torch's generator: for use without our loaders."""
        keys = torch.randint(1 << 62, (1,)).numpy().astype(np.uint64) if self.augment else np.zeros(1, np.uint64)
        images, labels = self.batch(np.array([index]), keys)
        return images[0], int(labels[0])

    def batch(self, indices: np.ndarray, keys: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised float32 (n, C, H, W) and int64 (n,); indices: int64 (n,), keys: uint64 (n,)."""
        # In numpy: one thread takes a fraction of a millisecond, torch's thread pool can wait for a busy core.
        images = self.pixels(indices, keys).astype(np.float32, order="C")
        images -= self.mean
        images *= self.scale
        return torch.from_numpy(images), self.labels[torch.from_numpy(indices)]

    def pixels(self, indices: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """uint8 (n, C, H, W), augmented if this set is."""
        raise NotImplementedError


class MemoryImages(Images):
    """Square images that lie in memory, uint8 (count, C, S, S).

    Augmentation: zero padding by S // 8 on each side, a random crop back to S, and with `flip` a mirror image every
    second time. (torchvision's transforms would do it image by image, ten times slower than the copy here.)
    """

    def __init__(self, images: np.ndarray, labels, mean, std, augment: bool = False, flip: bool = True):
        super().__init__(labels, mean, std, augment)
        self.images = images
        self.flip = flip

    def fetch(self, indices: np.ndarray) -> np.ndarray:
        return self.images[indices]

    def pixels(self, indices, keys) -> np.ndarray:
        plain = self.fetch(indices)
        if not self.augment:
            return plain
        size = plain.shape[-1]
        pad = size // 8
        padded = np.pad(plain, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        # Three fields of the key: 31 bits for each shift, the lowest for the mirror. A range is cut by multiplying.
        steps = np.uint64(2 * pad + 1)
        rows = ((keys >> np.uint64(33)) * steps >> np.uint64(31)).tolist()
        columns = ((keys >> np.uint64(2) & np.uint64(0x7FFFFFFF)) * steps >> np.uint64(31)).tolist()
        mirrored = ((keys & np.uint64(1)).astype(bool) & self.flip).tolist()
        out = np.empty_like(plain)
        for image, source, row, column, mirror in zip(out, padded, rows, columns, mirrored, strict=True):
            crop = source[:, row : row + size, column : column + size]
            image[...] = crop[:, :, ::-1] if mirror else crop
        return out


class KeptImages(MemoryImages):
    """Small images that are decoded when first asked for and then kept, if all of them fit in `keep_bytes`.

    read(index) gives uint8 (C, S, S). The pixels are kept in an anonymous shared mapping, so that what a forked
    loader worker decodes in one epoch is there for every process in the next; it takes memory as it fills.
    (128 CIFAR-sized JPEGs: 16 ms to decode, 1 ms to fetch, crop and normalise once kept; one CPU core.)
    """

    def __init__(
        self, read: Callable[[int], np.ndarray], shape: tuple[int, int, int], labels, mean, std, augment, keep_bytes
    ):
        super().__init__(None, labels, mean, std, augment)
        self.read = read
        self.kept = None
        total = len(self) * int(np.prod(shape))
        if total <= keep_bytes:
            self.images = np.frombuffer(mmap.mmap(-1, total), np.uint8).reshape(len(self), *shape)
            self.kept = np.frombuffer(mmap.mmap(-1, len(self)), np.uint8)

    def fetch(self, indices) -> np.ndarray:
        if self.kept is None:
            return np.stack([self.read(index) for index in indices.tolist()])
        for index in indices.tolist():
            if not self.kept[index]:
                self.images[index] = self.read(index)
                self.kept[index] = 1  # after the pixels: another process reads them only then
        return super().fetch(indices)

    def __getstate__(self) -> dict:
        # A worker that is spawned, not forked, shares no mapping: it decodes for itself.
        return self.__dict__ | {"images": None, "kept": None}


class TransformedImages(Images):
    """Large images, through one of torchvision's transforms; read(index) and transform(image) give RGB PIL images."""

    def __init__(self, read: Callable, transform: Callable, labels, mean, std, augment: bool):
        super().__init__(labels, mean, std, augment)
        self.read = read
        self.transform = transform

    def pixels(self, indices, keys) -> np.ndarray:
        images = seeded(lambda index: np.asarray(self.transform(self.read(index))), indices, keys)
        return np.stack([image.transpose(2, 0, 1) for image in images])
