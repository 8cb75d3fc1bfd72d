"""The schema of a run: every key of the command line, its type and its default.

The YAML files under conf/ fill these classes in; a key that is not here is refused. Checks that need more
than a type stand in `validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luqrun.errors import UserError

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
JOBS = ("train", "evaluate", "rounding", "cost")
BATCH_NORMS = ("local", "sync")
RANGE_SCOPES = ("rank", "global")
# What a data set of text brings in place of the default network and schedule, which are for images, on a command line
# that names none.
COMPANIONS = {
    "sentences": {"model": "transformer_tiny", "schedule": "sentences"},
    "parallel": {"model": "transformer_tiny", "schedule": "inverse_sqrt"},
    "multi30k": {"model": "transformer_tiny", "schedule": "inverse_sqrt"},
    "wmt14": {"model": "transformer_base", "schedule": "wmt14"},
    "facts": {"model": "bert_tiny", "schedule": "facts"},
    "squad": {"model": "bert", "schedule": "squad"},
}


@dataclass
class ModelConfig:
    """Which network. `stem`: of one for images: auto (small for images up to 64 pixels), small or full.

    `dropout`: of one for text, its share (null: the network's own). `weights`: what to start from, a file
    (luqrun.runs.weights), or of bert a folder in the Hugging Face layout; `new_head`: without the layer of the classes
    that is there, which is drawn.
    """

    name: str = "???"
    stem: str = "auto"
    dropout: float | None = None
    weights: str | None = None
    new_head: bool = False


@dataclass
class GlyphsConfig:
    """How the generated glyph images are drawn; counts are images, `noise` is a standard deviation where white is 1."""

    train_images: int = 10000
    val_images: int = 4000
    noise: float = 0.12


@dataclass
class DatasetConfig:
    """Where examples come from and how they are served. `limit`: a fixed random subset of the training examples.

    Of text (null: not read by this data set): `source` and `target`, the languages that a translation is from and to;
    `vocabulary`, how many subwords; `max_length`, in subwords, of a sentence or a window, and `stride`, by how many
    windows overlap; `batch_tokens`, how many subwords, padding included, a training batch of sentences has at most;
    `examples`, how many training examples are generated.
    """

    name: str = "???"
    root: str | None = None
    image_size: int = 224
    batch_size: int = 128
    workers: int = 0
    limit: int | None = None
    augment: bool = True
    glyphs: GlyphsConfig | None = None
    source: str | None = None
    target: str | None = None
    vocabulary: int | None = None
    max_length: int | None = None
    stride: int | None = None
    batch_tokens: int | None = None
    examples: int | None = None


@dataclass
class OperandConfig:
    """The quantizer of an operand in all its GEMMs; see luqrun.quant.quantizer.Quantizer."""

    format: str = "???"
    range: str = "absmax"
    rounding: str = "nearest"
    underflow: str | None = None
    pow2_scale: bool = False
    hindsight_momentum: float = 0.1
    largest: Any = None  # an integer or a number
    block: Any = None  # an integer, or a list of two
    scale_format: str | None = None
    scale_rounding: str | None = None
    four_over_six: str | None = None
    headroom: float | None = None
    eden: bool | None = None


@dataclass
class GradientConfig(OperandConfig):
    """The gradient's has draws to average. `samples_scope`: wgrad alone averages, or both GEMMs do."""

    samples: int = 1
    samples_scope: str = "wgrad"
    redraw_every: int = 1


@dataclass
class OperandChanges:
    """What differs in one GEMM: keys to change (null: unchanged); with a `format`, a whole quantizer of its own."""

    format: str | None = None
    range: str | None = None
    rounding: str | None = None
    underflow: str | None = None
    pow2_scale: bool | None = None
    hindsight_momentum: float | None = None
    largest: Any = None  # an integer or a number
    block: Any = None
    scale_format: str | None = None
    scale_rounding: str | None = None
    four_over_six: str | None = None
    headroom: float | None = None
    eden: bool | None = None
    requantize: bool | None = None


@dataclass
class GradientChanges(OperandChanges):
    samples: int | None = None
    redraw_every: int | None = None


@dataclass
class FpropConfig:
    """Operands of the output's GEMM (null: high precision), and a rotation of both (luqrun.quant.rotation)."""

    activation: OperandChanges | None = field(default_factory=OperandChanges)
    weight: OperandChanges | None = field(default_factory=OperandChanges)
    hadamard: int | None = None
    signs: str | None = None
    trust_mask: bool | None = None


@dataclass
class DgradConfig:
    """Operands of the GEMM of the input's gradient (null: high precision)."""

    gradient: GradientChanges | None = field(default_factory=GradientChanges)
    weight: OperandChanges | None = field(default_factory=OperandChanges)
    hadamard: int | None = None
    signs: str | None = None


@dataclass
class WgradConfig:
    """Operands of the GEMM of the weight's gradient (null: high precision)."""

    gradient: GradientChanges | None = field(default_factory=GradientChanges)
    activation: OperandChanges | None = field(default_factory=OperandChanges)
    hadamard: int | None = None
    signs: str | None = None


@dataclass
class QuantConfig:
    """A recipe: a quantizer, or none, for each operand, what differs in a GEMM, and the layers in high precision."""

    name: str = "???"
    weight: OperandConfig | None = None
    activation: OperandConfig | None = None
    gradient: GradientConfig | None = None
    fprop: FpropConfig | None = field(default_factory=FpropConfig)
    dgrad: DgradConfig | None = field(default_factory=DgradConfig)
    wgrad: WgradConfig | None = field(default_factory=WgradConfig)
    skip: list[str] = field(default_factory=lambda: ["first", "last", "shortcut"])


@dataclass
class ScheduleConfig:
    """Optimizer and learning rate. `accumulate` micro-batches make one step; `epochs` may be 0 where model.weights are
    fine-tuned alone.

    `warmup_steps`: instead of `warmup_epochs`; `beta2`: AdamW's second momentum (null: 0.999); `average`: the weights
    at the ends of that many last epochs are averaged (null: the last ones are taken).
    """

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
    warmup_steps: int | None = None
    beta2: float | None = None
    average: int | None = None


@dataclass
class HighPrecisionConfig:
    """By GEMM, the operands in high precision while the last phase trains; by default FNT's, all but the weights."""

    fprop: list[str] = field(default_factory=lambda: ["activation"])
    dgrad: list[str] = field(default_factory=lambda: ["gradient"])
    wgrad: list[str] = field(default_factory=lambda: ["gradient", "activation"])


@dataclass
class FinetuneConfig:
    """The last phase: epochs of training with operands in high precision (0: none). Evaluation has the recipe's."""

    name: str = "???"
    epochs: int = 0
    lr_base: float = 1e-3
    high_precision: HighPrecisionConfig = field(default_factory=HighPrecisionConfig)


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
class CostConfig:
    """What job=cost assumes. Speeds of matrix units, in any unit, by a product's wider operand. `length`: of sentences
    or windows, in subwords (null: 32 of a sentence, dataset.max_length of a window)."""

    speed_4bit: float = 1248.0
    speed_8bit: float = 624.0
    speed_bf16: float = 312.0
    speed_fp32: float = 156.0
    length: int | None = None


@dataclass
class CellConfig:
    """Which cell of which of the paper's tables or figures a run is.

    `scale`: embedded, small, cifar, cifar100 or paper.
    """

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
    cost: CostConfig = field(default_factory=CostConfig)
    job: str = "train"
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    fuse: bool = True
    study: str = "default"
    resume: str = "auto"
    reuse: bool = False
    cell: CellConfig = field(default_factory=CellConfig)


def conf_dir() -> Path:
    """The folder of YAML files: inside the package when installed from a wheel, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"conf/ was found neither in {here} nor beside it; install luqrun again")
