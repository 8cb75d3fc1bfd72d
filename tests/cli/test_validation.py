"""Mistakes that are found before anything starts: one line that names the key and what would be right."""

import pytest
from omegaconf import OmegaConf
from running import TINY, composed, tiny

from luqrun.cli.validation import to_config, validate
from luqrun.config import Config
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runs.start import find_start


@pytest.mark.parametrize("there", ["checkpoints/last.pt", "checkpoints/previous.pt", "summary.json"])
def test_a_checkpoint_that_is_gone_is_not_missed_where_the_run_has_its_own(tmp_path, there):
    config = tiny(f"resume={tmp_path / 'gone.pt'}")
    with pytest.raises(UserError, match=r"gone\.pt: no such file"):
        validate(config, lambda: tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / there).write_text("{}")
    validate(config, lambda: tmp_path)
    with pytest.raises(UserError, match=r"gone\.pt: no such file"):
        validate(config)


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "failed"}')
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for name in ("run", "link"):
        config = tiny(f"resume={tmp_path / name}")
        validate(config, lambda: tmp_path / "run")
        assert find_start(config, RunFolder(tmp_path / "run"), {}) is None
        with pytest.raises(UserError, match="is not the folder of a run"):
            validate(config, lambda: tmp_path / "other")


# The override, and what the message must name: the key, and what is allowed.
REFUSED = [
    ("+sead=1", "sead", ()),
    ("+task=rounding", "task is not a key", ("job=rounding",)),
    ("+schedule.epoch=3", "schedule", ("epoch",)),
    ("+quant.gradient.sample=2", "sample", ()),
    ("job=plan", "job=plan", ("command line alone", "not in a file")),
    ("job=plans", "job=plans", ("train, evaluate",)),
    ("schedule.epochs=0", "schedule.epochs=0", ("at least 1",)),
    ("model.weights=FILE schedule.epochs=0 finetune=fnt1 resume=base", "resume=base", ("model.weights",)),
    ("job=cost resume=base", "resume=base", ("job=train",)),
    ("job=evaluate model.weights=FILE resume=RUN", "resume=RUN", ("job=train",)),
    ("schedule.epochs=-3", "schedule.epochs=-3", ("at least 1",)),
    ("finetune.epochs=-1", "finetune.epochs=-1", ("at least 0",)),
    ("finetune.high_precision.fprop=[weights]", "finetune.high_precision.fprop=weights", ("activation, weight",)),
    ("finetune.high_precision.wgrad=[weight]", "finetune.high_precision.wgrad=weight", ("gradient, activation",)),
    ("finetune.high_precision.dgrad=[3]", "finetune.high_precision.dgrad=3", ("gradient, weight",)),
    ("+finetune.high_precision.bprop=[weight]", "finetune.high_precision.bprop", ("fprop, dgrad, wgrad",)),
    ("dataset.batch_size=0", "dataset.batch_size=0", ("at least 1",)),
    ("dataset.batch_size=-8", "dataset.batch_size=-8", ("at least 1",)),
    ("dataset.workers=-1", "dataset.workers=-1", ("at least 0",)),
    ("dataset.limit=0", "dataset.limit=0", ("at least 1",)),
    ("dataset.glyphs.train_images=0", "dataset.glyphs.train_images=0", ("at least 1",)),
    ("dataset.name=mnist", "dataset.name=mnist", ("glyphs", "cifar10", "imagenet")),
    ("quant.gradient.samples=0", "quant.gradient.samples=0", ("at least 1",)),
    ("quant.gradient.samples=-2", "quant.gradient.samples=-2", ("at least 1",)),
    ("quant.gradient.samples_scope=all", "quant.gradient.samples_scope=all", ("wgrad", "both")),
    ("quant.weight.format=int9", "quant.weight.format=int9", ("int4", "e3m0")),
    ("quant.weight.range=median", "quant.weight.range=median", ("absmax", "sawb", "hindsight")),
    ("quant.gradient.rounding=up", "quant.gradient.rounding=up", ("nearest", "stochastic")),
    ("quant.gradient.underflow=never", "quant.gradient.underflow=never", ("flush", "stochastic")),
    ("quant.gradient.range=sawb", "quant.gradient.range=sawb", ("int4",)),
    ("quant.weight.hindsight_momentum=1.0", "quant.weight.hindsight_momentum=1.0", ("eta < 1",)),
    ("quant.weight.block=32", "quant.weight.range=sawb", ("absmax, rms",)),
    ("quant=mxfp4 quant.weight.block=0", "quant.weight.block=0", ("positive integer",)),
    ("quant=mxfp4 quant.weight.block=[16,16,16]", "quant.weight.block=[16, 16, 16]", ("such as 32 or [16, 16]",)),
    ("quant=mxfp4 quant.weight.block=many", "quant.weight.block='many'", ("an integer",)),
    ("quant=mxfp4 quant.gradient.range=hindsight", "quant.gradient.range=hindsight", ("absmax, rms",)),
    ("quant=mxfp4 quant.weight.range=sawb", "quant.weight.range=sawb", ("int4",)),
    ("quant=mxfp4 quant.weight.scale_format=e5m2", "quant.weight.scale_format=e5m2", ("e8m0, e4m3, fp32",)),
    ("quant=mxfp4 quant.weight.scale_rounding=up", "quant.weight.scale_rounding=up", ("floor, rceil, ceil",)),
    ("quant=mxfp4 quant.weight.four_over_six=mse", "quant.weight.four_over_six", ("scale_format=e4m3",)),
    ("quant=mxfp4 quant.weight.largest=20", "quant.weight.largest=20", ("3 to 12",)),
    ("quant=mxfp4 quant.weight.largest=much", "quant.weight.largest='much'", ("a number",)),
    ("quant=mxfp4 quant.weight.headroom=2", "quant.weight.headroom=2.0", ("0 < headroom <= 1",)),
    ("quant=mxfp4 quant.weight.eden=true", "quant.weight.eden", ("scale_format=e4m3",)),
    ("quant=mxfp4 quant.fprop.hadamard=12", "quant.fprop.hadamard=12", ("2, 4, 8, 16", "null")),
    ("quant=mxfp4 quant.fprop.signs=fixed", "quant.fprop.signs=fixed", ("quant.fprop.hadamard",)),
    ("quant=mxfp4 quant.fprop.weight.requantize=true", "quant.fprop.weight.requantize", ("quant.dgrad.weight",)),
    ("quant=mxfp4 quant.fprop.trust_mask=true", "quant.fprop.trust_mask", ("range=rms", "false")),
    ("quant=mxfp4 quant.fprop.trust_mask=3", "quant.fprop.trust_mask", ()),
    ("+quant.weight.blocks=32", "quant.weight.blocks", ("block",)),
    ("+quant.weight.hadamard=32", "quant.weight.hadamard", ()),
    ("precision=fp8", "precision=fp8", ("fp32", "bf16")),
    ("device=tpu", "device=tpu", ("auto", "cpu", "cuda")),
    ("seed=-1", "seed=-1", ("at least 0",)),
    ("seed=2147483648", "seed=2147483648", ("at most 2147483647",)),
    ("study=../up", "study=../up", ("folder name",)),
    ("study=/tmp/up", "study=/tmp/up", ("folder name",)),
    ("study=", "study=", ("folder name",)),
    ("tracking.log_every=-1", "tracking.log_every=-1", ("at least 0",)),
    ("schedule.name=exponential", "schedule.name=exponential", ("step", "cosine", "onecycle")),
    ("schedule.lr=0", "schedule.lr=0", ("above 0",)),
    ("schedule.lr=nan", "schedule.lr=nan", ("finite",)),
    ("schedule.average=9", "schedule.average=9", ("at most schedule.epochs=1", "null")),
    ("schedule.accumulate=0", "schedule.accumulate=0", ("at least 1",)),
]


@pytest.mark.parametrize(("override", "named", "allowed"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_mistake_is_named_with_what_is_allowed(override, named, allowed):
    with pytest.raises(UserError) as refusal:
        validate(to_config(composed(*TINY, *override.split())))
    text = str(refusal.value)
    assert named in text
    for word in allowed:
        assert word in text
    assert "\n" not in text


@pytest.mark.parametrize("override", ["+sead=1", "+schedule.epoch=3"])
def test_an_unknown_key_is_answered_with_the_keys_there_are(override):
    with pytest.raises(UserError, match="epochs" if "schedule" in override else "seed"):
        to_config(composed(*TINY, override))


@pytest.mark.parametrize(
    ("key", "value"),
    [("schedule.epochs", "many"), ("schedule.epochs", 1.5), ("dataset.augment", "perhaps"), ("schedule.lr", "fast")],
)
def test_a_wrong_type_is_named_with_the_right_one(key, value):
    config = OmegaConf.create(OmegaConf.to_container(composed(*TINY)))  # without types: Hydra checks only its own
    OmegaConf.update(config, key, value)
    with pytest.raises(UserError) as refusal:
        to_config(config)
    assert key in str(refusal.value)
    assert str(value) in str(refusal.value)


def test_a_key_that_nobody_set_is_named():
    with pytest.raises(UserError, match=r"model\.name"):
        to_config(composed(*TINY, "model.name=???"))


def test_a_composed_config_becomes_the_dataclasses():
    config = tiny("schedule.lr=0.25", "dataset.limit=100")
    assert isinstance(config, Config)
    assert (config.schedule.lr, config.dataset.limit, config.quant.gradient.format) == (0.25, 100, "e3m0")
    assert config.finetune.lr_base == config.schedule.finetune_lr  # interpolations are resolved
    validate(config)
