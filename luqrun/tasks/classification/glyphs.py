"""The default data set: glyphs drawn here, so that a first run needs neither a download nor a file.

The drawing uses only integer arithmetic and the correctly rounded float operations (+, -, *, /), so that every
machine with the same Pillow draws the same bytes. It depends on no run seed: like CIFAR, the set is a fixed thing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import zipfile

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from luqrun.config import DatasetConfig, GlyphsConfig
from luqrun.errors import UserError
from luqrun.tasks.cache import cache_folder
from luqrun.tasks.classification.image_data import ImageData
from luqrun.tasks.classification.pixels import MemoryImages
from luqrun.tasks.subset import subset

log = logging.getLogger(__name__)

# Ten digits, the capitals, and the lower-case letters whose shape is not their capital's.
CLASSES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
# Of the default images; constants, so that another noise or size does not move the normalisation.
MEAN, STD = (0.32,), (0.23,)

DRAWING = 2  # part of the cache key: raise it when the images change
DATA_SEED = 2112
OVERSAMPLING = 2  # pixels of a glyph's template for one pixel of the image
CHUNK = 500  # images drawn at once: the temporaries stay in the cache


def build_glyphs(config: DatasetConfig) -> ImageData:
    """Draw, or read from the cache, the generated set: grey images, (1, image_size, image_size).

    `dataset.augment` shifts the training images by up to an eighth of their side; it never mirrors them,
    because b and d are two classes.
    """
    glyphs = config.glyphs or GlyphsConfig()
    _check_memory(glyphs, config.image_size)
    train, train_labels, val, val_labels = _cached(glyphs, config.image_size)
    chosen = subset(len(train), config.limit, "images")
    return ImageData(
        train=MemoryImages(train[chosen], train_labels[chosen], MEAN, STD, augment=config.augment, flip=False),
        val=MemoryImages(val, val_labels, MEAN, STD),
        classes=CLASSES,
        channels=1,
        image_size=config.image_size,
        of=len(train),
    )


def _check_memory(glyphs: GlyphsConfig, size: int) -> None:
    """UserError for images that this machine's memory cannot hold: the system might end the process without a word."""
    count = glyphs.train_images + glyphs.val_images
    needed = count * (size**2 + 16) + len(CLASSES) * (OVERSAMPLING * size) ** 2 * 4 + CHUNK * size**2 * 64
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"dataset.glyphs.train_images={glyphs.train_images} and val_images={glyphs.val_images} at "
            f"dataset.image_size={size} take {needed / 2**30:.0f} GiB, this machine has {there / 2**30:.0f} GiB"
        )


def draw(count: int, size: int, noise: float, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images of one split (0: training, 1: validation); classes take turns.

    Returns uint8 (count, 1, size, size) and int64 labels (count,). `noise` is a standard deviation in units
    where white is 1.
    """
    templates = _templates(OVERSAMPLING * size)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([DATA_SEED, split])))
    labels = np.arange(count) % len(CLASSES)
    images = np.empty((count, 1, size, size), np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        images[part, 0] = _draw_chunk(rng, templates, labels[part], size, noise)
    return images, labels


def _draw_chunk(rng, templates, labels, size, noise) -> np.ndarray:
    n = len(labels)

    def uniform(low, high):
        return (low + (high - low) * rng.random((n, 1, 1))).astype(np.float32)

    # Pixel positions from the centre, in image sides: -0.5 .. 0.5.
    y, x = (np.mgrid[:size, :size].astype(np.float32) - np.float32((size - 1) / 2)) / np.float32(size)

    background = uniform(0.05, 0.45) + uniform(-0.35, 0.35) * x + uniform(-0.35, 0.35) * y
    background += uniform(-0.6, 0.6) * x * y
    ink = uniform(0.42, 0.84) * _place(
        templates, labels, x, y, _affine(uniform), uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    )
    # Clutter: another glyph that sticks in from one side.
    side = np.where(uniform(0, 1) < 0.5, np.float32(-1), np.float32(1))
    across, along = side * uniform(0.39, 0.55), uniform(-0.4, 0.4)
    upright = uniform(0, 1) < 0.5
    dx, dy = np.where(upright, along, across), np.where(upright, across, along)
    others = rng.integers(len(templates), size=n)
    clutter = uniform(0.33, 0.75) * _place(templates, others, x, y, _affine(uniform), dx, dy)

    # The sum of four uniform 16-bit numbers: bell-shaped, and no library's logarithm is in it.
    bell = rng.integers(1 << 16, size=(n, size, size, 4), dtype=np.uint16)
    bell = bell[..., 0].astype(np.int32) + bell[..., 1] + bell[..., 2] + bell[..., 3]
    bell = (bell - 131070).astype(np.float32) * np.float32(noise * 3**0.5 / 65536)

    image = background + np.maximum(ink, clutter) + bell
    return np.rint(np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)


def _affine(uniform) -> tuple:
    """Random maps from image to glyph, (a, b, c, d) each (n, 1, 1): shear, rotation and scale."""
    # The tangent of half the angle gives sine and cosine without a library call: +-20 degrees.
    t = uniform(-0.18, 0.18)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    shear, zoom_x, zoom_y = uniform(-0.25, 0.25), 1 / uniform(0.8, 1.25), 1 / uniform(0.8, 1.25)
    return zoom_x * (cos + shear * sin), zoom_x * (shear * cos - sin), zoom_y * sin, zoom_y * cos


def _place(templates, labels, x, y, affine, dx, dy) -> np.ndarray:
    """Coverage (n, size, size) in [0, 1] of glyph labels[i], mapped by affine[i] and moved by (dx, dy)[i] sides."""
    a, b, c, d = affine
    last = templates.shape[1] - 1  # rows and columns 0 and last are empty: whatever lies outside is clipped there
    x, y = x - dx, y - dy
    u = np.clip((a * x + b * y) * np.float32(last) + np.float32(last / 2), 0, last - np.float32(0.001))
    v = np.clip((c * x + d * y) * np.float32(last) + np.float32(last / 2), 0, last - np.float32(0.001))
    column, row = u.astype(np.int32), v.astype(np.int32)
    u -= column
    v -= row
    flat = templates.reshape(-1)
    at = (labels.astype(np.int32).reshape(-1, 1, 1) * (last + 1) + row) * (last + 1) + column
    top = flat[at] * (1 - u) + flat[at + 1] * u
    at += last + 1
    bottom = flat[at] * (1 - u) + flat[at + 1] * u
    return top * (1 - v) + bottom * v


def _templates(side: int) -> np.ndarray:
    """Every class once, centred, float32 (47, side, side) in [0, 1], from Pillow's built-in font."""
    font = ImageFont.load_default(size=side * 0.72)
    templates = np.zeros((len(CLASSES), side, side), np.float32)
    for template, character in zip(templates, CLASSES, strict=True):
        canvas = Image.new("L", (side, side))
        pen = ImageDraw.Draw(canvas)
        left, top, right, bottom = pen.textbbox((0, 0), character, font=font)
        pen.text(((side - left - right) // 2, (side - top - bottom) // 2), character, fill=255, font=font)
        template[1:-1, 1:-1] = np.asarray(canvas, np.float32)[1:-1, 1:-1] / np.float32(255)
    return templates


def _cached(config: GlyphsConfig, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, validation images and labels: from the cache file if there is a good one."""
    key = [DRAWING, PIL.__version__, size, config.train_images, config.val_images, float(config.noise)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = cache_folder()
    file = folder / f"glyphs-{digest}.npz"
    names = ("train", "train_labels", "val", "val_labels")
    try:
        with np.load(file) as stored:  # a zip: its checksums find damage
            return tuple(stored[name] for name in names)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged and is drawn again (%s)", file, error)
    arrays = draw(config.train_images, size, config.noise, 0) + draw(config.val_images, size, config.noise, 1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name first: a second process never sees half a file.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as temporary:
            try:
                np.savez(temporary, **dict(zip(names, arrays, strict=True)))
                temporary.close()
                os.replace(temporary.name, file)
            except BaseException:
                os.unlink(temporary.name)
                raise
    except OSError as error:
        log.warning("cannot cache the glyphs in %s (%s): they are drawn again each time", folder, error.strerror)
    return arrays
