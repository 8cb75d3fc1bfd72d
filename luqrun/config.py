"""The schema of a run: every key of the command line, its type and its default.

The YAML files under conf/ fill these classes in; a key that is not here is refused. Checks that need more
than a type stand in `validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from luqrun.errors import UserError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
JOBS = ("train", "rounding")
BATCH_NORMS = ("local", "sync")
RANGE_SCOPES = ("rank", "global")


@dataclass
class ModelConfig:
    """Which network. `stem`: auto (small for images up to 64 pixels), small or full."""

    name: str = "???"
    stem: str = "auto"


@dataclass
class GlyphsConfig:
    """How the generated glyph images are drawn; counts are images, `noise` is a standard deviation where white is 1."""

    train_images: int = 10000
    val_images: int = 4000
    noise: float = 0.12


@dataclass
class DatasetConfig:
    """Where images come from and how they are served. `limit`: a fixed random subset of the training images."""

    name: str = "???"
    root: str | None = None
    image_size: int = 224
    batch_size: int = 128
    workers: int = 0
    limit: int | None = None
    augment: bool = True
    glyphs: GlyphsConfig | None = None


@dataclass
class OperandConfig:
    """One quantizer: how one operand of the GEMMs becomes 4-bit codes."""

    format: str = "???"
    range: str = "absmax"
    rounding: str = "nearest"
    pow2_scale: bool = False
    hindsight_momentum: float = 0.1


@dataclass
class GradientConfig(OperandConfig):
    """The gradient's quantizer: logarithmic formats add an underflow rule, re-sampling adds samples; see Quantizer."""

    underflow: str | None = None
    samples: int = 1
    samples_scope: str = "wgrad"
    redraw_every: int = 1
    two_phase: bool = False


@dataclass
class QuantConfig:
    """A recipe: a quantizer, or none, for each operand, and the layers that stay in high precision."""

    name: str = "???"
    weight: OperandConfig | None = None
    activation: OperandConfig | None = None
    gradient: GradientConfig | None = None
    skip: list[str] = field(default_factory=lambda: ["first", "last", "shortcut"])


@dataclass
class ScheduleConfig:
    """Optimizer and learning rate. `accumulate` micro-batches make one step; epochs may not be zero."""

    name: str = "???"
    epochs: int = 6
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    warmup_epochs: float = 0.0
    milestones: list[int] = field(default_factory=lambda: [30, 60, 80])
    gamma: float = 0.1
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    accumulate: int = 1
    finetune_lr: float = 1e-3


@dataclass
class FinetuneConfig:
    """FNT: epochs of training with INT4 weights and everything else in high precision (0: none)."""

    name: str = "???"
    epochs: int = 0
    lr_base: float = 1e-3


@dataclass
class TrackingConfig:
    """How often things are written, in optimizer steps (0: never); and how many steps are profiled."""

    log_every: int = 20
    health_every: int = 100
    histogram_every: int = 500
    checkpoint_every: int = 500
    profile_steps: int = 0


@dataclass
class DistributedConfig:
    """What several processes (torchrun) share. `batch_norm`: local (each its own statistics) or sync; `range`: the
    ranges of activations and gradients are of a rank's part of the batch, or global, of all parts."""

    batch_norm: str = "local"
    range: str = "rank"


@dataclass
class CellConfig:
    """Which cell of which of the paper's tables or figures a run is; `scale`: glyphs, cifar, cifar100 or paper."""

    table: str | None = None
    scale: str | None = None
    row: str | None = None
    column: str | None = None


@dataclass
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    job: str = "train"
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    study: str = "default"
    resume: str = "auto"
    reuse: bool = False
    cell: CellConfig = field(default_factory=CellConfig)


def check_choice(key: str, value: str, allowed) -> None:
    """Raise UserError naming `key` and what is allowed."""
    if value not in allowed:
        raise UserError(f"{key}={value} is not known; allowed: {', '.join(allowed)}")


def check_at_least(key: str, value: float, least: float) -> None:
    """Raise UserError if value < least."""
    if value < least:
        raise UserError(f"{key}={value} is too small; it must be at least {least}")


def check_at_most(key: str, value: float, most: float) -> None:
    """Raise UserError if value > most."""
    if value > most:
        raise UserError(f"{key}={value} is too large; it must be at most {most}")


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dicts of settings to one with dotted keys, such as dataset.root."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def conf_dir() -> Path:
    """The folder of YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"conf/ was found neither in {here} nor beside it; install luqrun again")
