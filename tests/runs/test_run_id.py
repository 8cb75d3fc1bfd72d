"""The name of a run's folder: everything that decides its result is in it, and nothing else."""

import json
import os
import re
from dataclasses import asdict, fields, replace

import pytest
import yaml
from running import composed, tiny

from luqrun import RESULTS
from luqrun.cli.validation import to_config
from luqrun.config import Config, DatasetConfig
from luqrun.runs import identity
from luqrun.runs.identity import deciding_settings, run_id

DATA = {"root": "/data", "classes": 3, "training_images": 9, "names_and_sizes": "0a"}  # a fingerprint
SAME_RESULT = [
    "study=other",
    "resume=never",
    "reuse=true",
    "cell.table=fig2",
    "device=auto",
    "compile=true",
    "dataset.workers=3",
    "schedule.finetune_lr=0.3",
    "finetune.lr_base=0.3",
    "dataset.root=/somewhere",
    "tracking.log_every=7",
    "tracking.checkpoint_every=1",
    "cost.speed_4bit=1.0",  # of job=cost alone
]
OTHER_RESULT = [
    "job=rounding",
    "job=cost",
    "seed=1",
    "precision=bf16",
    "fuse=false",
    "model=resnext8",
    "model.stem=small",
    "dataset.limit=100",
    "dataset.augment=true",
    "dataset.batch_size=16",
    "dataset.glyphs.noise=0.2",
    "quant=fp32",
    "quant.gradient.samples=2",
    "quant=mxfp4",
    "quant=luq quant.weight.range=absmax quant.weight.block=32",
    "quant=luq quant.weight.range=absmax quant.weight.block=[16,16]",
    "quant.wgrad.hadamard=16",
    "quant.skip=[first]",
    "schedule.lr=0.2",
    "schedule.epochs=2",
    "schedule.accumulate=2",
    "finetune=fnt1",
    "finetune.epochs=4",
    "finetune=forward_high1",
    "finetune=qaf1",
    "distributed.batch_norm=sync",
    "distributed.range=global",
]


KEYS_OF_BLOCKS = {
    "block", "scale_format", "scale_rounding", "four_over_six", "headroom", "eden", "requantize", "hadamard", "signs",
    "trust_mask",
}  # fmt: skip


def test_run_id_is_readable_and_has_no_clock(monkeypatch):
    name = run_id(tiny("finetune=fnt3"), {})
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert run_id(tiny("finetune=fnt3"), {}) == name
    assert re.fullmatch(r"resnet8-glyphs-luq-fnt3-seed0-[0-9a-f]{8}", name)
    assert re.fullmatch(r"resnet8-glyphs-fp32-seed7-[0-9a-f]{8}", run_id(tiny("quant=fp32", "seed=7"), {}))


@pytest.mark.parametrize("override", SAME_RESULT)
def test_run_id_is_the_same_for_what_does_not_change_the_result(override):
    assert tiny(override) != tiny()
    assert run_id(tiny(override), {}) == run_id(tiny(), {})


def test_run_id_differs_for_everything_that_changes_the_result():
    names = [run_id(tiny(*override.split()), {}) for override in OTHER_RESULT]
    assert len({run_id(tiny(), {}), *names}) == len(OTHER_RESULT) + 1


def without_null(values):
    """Nested settings without what is null in the part of a quantizer or a GEMM."""
    if not isinstance(values, dict):
        return values
    return {key: without_null(value) for key, value in values.items() if value is not None or key not in KEYS_OF_BLOCKS}


@pytest.mark.parametrize("scheme", ["luq", "radix4_tpr", "fp32", "forward_only", "luq_smp2"])
def test_keys_of_blocks_that_are_null_are_not_in_the_name_of_a_run_without_them(scheme):
    config = tiny(f"quant={scheme}")
    quant = deciding_settings(config)["quant"]
    assert quant == without_null(asdict(config)["quant"])
    for part in (quant, *quant.values(), quant["wgrad"]["gradient"] if quant["wgrad"] else {}):
        assert not (KEYS_OF_BLOCKS & part.keys() if isinstance(part, dict) else ())
    earlier = asdict(config)
    earlier["quant"] = without_null(earlier["quant"])  # as its config.yaml was written
    assert deciding_settings(earlier) == deciding_settings(config)


def test_the_fine_tune_s_operands_are_in_the_name_but_for_those_of_fnt_which_earlier_runs_did_not_say():
    config = tiny("finetune=fnt2")
    earlier = asdict(config)
    del earlier["finetune"]["high_precision"]
    assert deciding_settings(earlier) == deciding_settings(config)
    assert deciding_settings(config)["finetune"].keys() == {"name", "epochs", "lr_base"}
    key = "finetune.high_precision"
    names = {
        operands: run_id(tiny("finetune=fnt2", f"{key}.wgrad=[{operands}]"), {})
        for operands in ("gradient,activation", "activation,gradient,activation", "gradient", "activation", "")
    }
    assert names.pop("gradient,activation") == names.pop("activation,gradient,activation") == run_id(config, {})
    assert len({run_id(config, {}), *names.values()}) == 4
    assert run_id(tiny(f"{key}.dgrad=[weight]"), {}) == run_id(tiny(), {})  # without a fine-tune


def test_every_top_level_key_was_thought_of():
    covered = {override.split("=")[0].split(".")[0] for override in SAME_RESULT + OTHER_RESULT}
    assert covered == {field.name for field in fields(Config)}


def test_the_root_of_a_folder_data_set_is_a_deciding_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    absolute, relative, other = (
        run_id(to_config(composed("dataset=folder", f"dataset.root={root}")), {}) for root in (tmp_path / "a", "a", "b")
    )
    assert absolute == relative
    assert absolute != other


def test_run_id_makes_a_folder_name_of_any_name(tmp_path):
    config = tiny()
    for name in ("a/b c", "../up", "ü" * 400, "x" * 400):
        config.quant = replace(config.quant, name=name)
        identity = run_id(config, {})
        assert len(os.fsencode(identity)) <= 255
        (tmp_path / identity).mkdir()
        assert (tmp_path / identity).parent == tmp_path


def test_the_deciding_settings_are_plain_json():
    values = deciding_settings(tiny())
    assert json.loads(json.dumps(values)) == values


@pytest.mark.parametrize(
    "overrides", [(), ("finetune=fnt1",), ("finetune=qaf1",), ("job=rounding",), ("distributed.range=global",)]
)
def test_the_deciding_settings_are_the_same_of_a_config_read_again(overrides):
    config = tiny(*overrides)
    assert deciding_settings(yaml.safe_load(yaml.safe_dump(asdict(config)))) == deciding_settings(config)


@pytest.mark.parametrize("damaged", [None, 3, [], {}, {"fprop": None, "dgrad": {}, "wgrad": [3, None]}], ids=str)
def test_damaged_operands_of_a_fine_tune_are_compared_as_they_are(damaged):
    found = deciding_settings({"finetune": {"epochs": 1, "high_precision": damaged}})["finetune"]
    assert found.keys() == {"epochs", "high_precision"}
    assert found != deciding_settings(tiny("finetune=fnt1"))["finetune"]


@pytest.mark.parametrize("root", ["a\0b", "\ud800", 3.5, [1], {}])
def test_a_root_that_is_no_path_stays_as_it_is(root):
    config = {"dataset": {"name": "folder", "root": root, "workers": 3}, "schedule": None, "finetune": [], "cell": 1}
    assert deciding_settings(config) == {"dataset": {"name": "folder", "root": root}, "schedule": None, "finetune": []}
    assert config["dataset"]["workers"] == 3  # not changed


@pytest.mark.parametrize(
    "other",
    [{"classes": 4}, {"names_and_sizes": "0b"}, {"sentences": 1}, {"classes": ...}],
    ids=["a count", "the hash", "more", "less"],
)
def test_other_data_have_another_name_and_the_same_elsewhere_have_not(other):
    changed = {name: value for name, value in {**DATA, **other}.items() if value is not ...}
    config = replace(tiny(), dataset=DatasetConfig(name="imagenet", root="/data"))
    assert run_id(config, changed) != run_id(config, DATA)
    assert run_id(config, {**DATA, "root": "/elsewhere"}) == run_id(config, DATA)


def test_results_and_processes_are_in_the_name_and_the_package_version_is_not(monkeypatch):
    name = run_id(tiny(), {})
    assert run_id(tiny(), {}, processes=2) != name
    monkeypatch.setattr("luqrun.__version__", "9.9")
    assert run_id(tiny(), {}) == name
    monkeypatch.setattr(identity, "RESULTS", RESULTS + 1)
    assert run_id(tiny(), {}) != name
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_id(tiny(), {}) == run_id(tiny(), {}, processes=2)


def test_runs_of_before_there_was_a_key_are_those_with_what_they_did():
    config = asdict(tiny())
    assert config.pop("fuse") is True
    assert deciding_settings(config) == deciding_settings(tiny())
    assert deciding_settings(config) != deciding_settings(tiny("fuse=false"))
