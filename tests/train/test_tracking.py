"""What a run shows of itself: curves read back from the event files, and hyper-parameters that compare."""

import math
import signal
import time
from collections import defaultdict
from unittest import mock

import pytest
import torch
from running import build_trainer, metrics, quiet_machine, tiny, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard.summary import scalar

from luqrun.quant.convert import quantized_layers
from luqrun.runs import checkpoint
from luqrun.runs.folder import RunFolder
from luqrun.runtime.signals import Requests, Stopped
from luqrun.tasks import METRICS
from luqrun.tasks.classification.task import Classification
from luqrun.train.events import EventFile
from luqrun.train.tracking import Tracker, hyper_parameters
from luqrun.train.trainer import Trainer
from luqrun.train.trainer import run as run_training

FINAL_METRICS = [metric.name for metric in Classification.metrics]
LAYERS = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2")
OPERANDS = ("weight", "activation", "gradient")
SHARES = tuple(f"quantization/{name}" for name in ("clipped_share", "underflow_share", "relative_error"))


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder.path), {"scalars": 0, "histograms": 0}).Reload()


def points(folder, tag) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


@pytest.fixture(scope="module")
def luq_run(trained):
    return trained("finetune=fnt1", "tracking.histogram_every=5")


@pytest.fixture(scope="module")
def fp32_run(trained):
    return trained("quant=fp32")


def test_the_curves_are_the_lines_of_metrics_jsonl(luq_run):
    expected = defaultdict(list)
    for line in metrics(luq_run):
        for name in line.keys() - {"kind", "phase", "epoch", "step"}:
            expected[name].append((line["step"], pytest.approx(line[name])))
    assert expected.keys() == {"loss", "lr", "train/loss", "train/top1", *FINAL_METRICS}
    for name, values in expected.items():
        assert points(luq_run, name) == values
    lately, mean = points(luq_run, "images_per_second"), points(luq_run, "mean_images_per_second")
    assert [step for step, _ in lately] == list(range(2, 17, 2))
    assert [step for step, _ in mean] == [8, 16]


def test_one_line_every_few_steps_and_one_an_epoch(luq_run):
    found = [(line["kind"], line["phase"], line["epoch"], line["step"]) for line in metrics(luq_run)]
    assert found == (
        [("step", "train", 1, step) for step in (2, 4, 6, 8)]
        + [("epoch", "train", 1, 8)]
        + [("step", "finetune", 2, step) for step in (10, 12, 14, 16)]
        + [("epoch", "finetune", 2, 16)]
    )


def test_health_of_every_layer_and_operand(luq_run):
    tags = {tag for tag in events(luq_run).Tags()["scalars"] if tag.startswith(SHARES)}
    assert tags == {f"{share}/{layer}/{operand}" for share in SHARES for layer in LAYERS for operand in OPERANDS}
    for tag in tags:
        found = points(luq_run, tag)
        # Every third step; in the fine-tune phase (steps 9 to 16) only weights are quantized.
        due = [1, 4, 6, 7] + ([10, 11, 13, 16] if tag.endswith("/weight") else [])
        assert [step for step, _ in found] == due
        assert all(math.isfinite(value) and value >= 0 for _, value in found)
        if not tag.startswith("quantization/relative_error"):
            assert all(value <= 1 for _, value in found)
    for layer in LAYERS:
        assert all(0 < value < 0.5 for _, value in points(luq_run, f"quantization/relative_error/{layer}/weight"))
        assert all(value == 0 for _, value in points(luq_run, f"quantization/clipped_share/{layer}/gradient"))  # absmax


def test_histograms_of_the_gradient_are_sparse_and_whole(luq_run):
    found = events(luq_run)
    assert set(found.Tags()["histograms"]) == {f"log2_gradient/{layer}" for layer in LAYERS}
    for layer in LAYERS:
        rows = found.Histograms(f"log2_gradient/{layer}")
        assert [row.step for row in rows] == [1, 6, 11, 16]
        for row in rows:
            value = row.histogram_value
            assert sum(value.bucket) == value.num > 1000
            assert value.bucket[0] > 0
            assert value.bucket[-1] > 0
            assert len(value.bucket) == len(value.bucket_limit)
            assert value.bucket_limit == list(range(int(value.min) + 1, int(value.max) + 1))
            assert value.min <= value.sum / value.num <= value.max < 10
            assert value.sum_squares * value.num >= value.sum**2


def test_the_histogram_counts_exponents(tmp_path):
    folder = RunFolder(tmp_path)
    tracker = Tracker(tiny("quant=fp32"), folder, FINAL_METRICS, done=0)
    counts = torch.zeros(256, dtype=torch.int64)
    counts[0], counts[127 - 3], counts[127 - 1] = 50, 4, 2  # zeros and subnormals, [1/8, 1/4), [1/2, 1)
    tracker._exponent_histogram("layer", counts.numpy(), 7)
    tracker._exponent_histogram("dead", torch.zeros(256, dtype=torch.int64).numpy(), 7)
    tracker.close()
    found = events(folder)
    assert found.Tags()["histograms"] == ["log2_gradient/layer"]
    value = found.Histograms("log2_gradient/layer")[0].histogram_value
    assert (list(value.bucket_limit), list(value.bucket)) == ([-2, -1, 0], [4, 0, 2])
    assert (value.min, value.max, value.num) == (-3, 0, 6)


def test_one_tensorboard_run_a_folder(luq_run):
    assert len(list(luq_run.path.rglob("events.out.tfevents.*"))) == 1
    assert list(luq_run.path.glob("events.out.tfevents.*"))


def session(folder) -> tuple[dict, list[str], list[str]]:
    """(hyper-parameters, metrics, declared hyper-parameters) that TensorBoard finds in a run."""
    content = events(folder).summary_metadata
    read = {}
    for tag in ("_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"):
        read[tag] = plugin_data_pb2.HParamsPluginData.FromString(content[tag].plugin_data.content)
    start = read["_hparams_/session_start_info"].session_start_info.hparams
    values = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.items()}
    experiment = read["_hparams_/experiment"].experiment
    return values, [info.name.tag for info in experiment.metric_infos], [info.name for info in experiment.hparam_infos]


def test_hyper_parameters_compare_across_recipes(luq_run, fp32_run):
    values, names, declared = session(luq_run)
    other_values, other_names, other_declared = session(fp32_run)
    assert declared == other_declared  # TensorBoard shows those of the run that it finds first
    assert {key: type(value) for key, value in values.items()} == {k: type(v) for k, v in other_values.items()}
    assert names == other_names
    assert names[: len(FINAL_METRICS)] == FINAL_METRICS
    assert set(FINAL_METRICS) <= set(events(luq_run).Tags()["scalars"])
    assert set(FINAL_METRICS) <= set(events(fp32_run).Tags()["scalars"])
    assert sorted(names) == sorted(METRICS)  # those of other tasks too
    assert (values["quant.name"], other_values["quant.name"]) == ("luq", "fp32")
    assert values["quant.gradient.format"] == "e3m0"
    assert other_values["quant.gradient.format"] == other_values["dataset.limit"] == "none"
    assert "dataset.root" not in values
    assert "study" not in values
    assert values["schedule.lr"] == pytest.approx(0.1)
    assert values["quant.skip"] == "['first', 'last', 'shortcut']"
    assert set(declared) == set(values)


@pytest.mark.parametrize(
    ("overrides", "dgrad", "wgrad"),
    [
        ((), "none", "none"),
        (("quant=radix4_tpr",), "none", "gradient.largest=8192"),
        (("quant.dgrad.weight=null", "quant.wgrad=null"), "weight=high precision", "high precision"),
    ],
)
def test_what_differs_in_a_gemm_is_one_hyper_parameter(overrides, dgrad, wgrad):
    shown = hyper_parameters(tiny(*overrides))
    assert (shown["quant.dgrad"], shown["quant.wgrad"]) == (dgrad, wgrad)


def test_no_health_where_nothing_is_quantized(fp32_run):
    found = events(fp32_run).Tags()
    assert not [tag for tag in found["scalars"] if tag.startswith(SHARES)]
    assert found["histograms"] == []


def test_zero_means_never(tmp_path):
    never = [f"tracking.{name}_every=0" for name in ("log", "health", "histogram", "checkpoint")]
    _, folder = train(tmp_path / "run", *never)
    assert [line["kind"] for line in metrics(folder)] == ["epoch"]
    of_an_epoch = {"train/loss", "train/top1", "mean_images_per_second", *FINAL_METRICS}
    assert set(events(folder).Tags()["scalars"]) == of_an_epoch
    assert events(folder).Tags()["histograms"] == []


def interrupted(monkeypatch, path, at, *overrides):
    """The same run, stopped before step `at` (from 0)."""
    step = Trainer.train_step

    def stop(self, micro_batches):
        if self.progress["step"] == at:
            raise KeyboardInterrupt
        return step(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(path, *overrides)


@pytest.mark.parametrize(
    ("every", "at"),
    [(5, 13), (0, 13), (7, 7)],
    ids=["from mid-epoch", "from the end of an epoch", "from a step with health and without a line"],
)
def test_curves_of_a_resumed_run_have_every_point_once(tmp_path, monkeypatch, luq_run, every, at):
    overrides = ("finetune=fnt1", "tracking.histogram_every=5", f"tracking.checkpoint_every={every}")
    interrupted(monkeypatch, tmp_path / "run", at, *overrides)
    _, resumed = train(tmp_path / "run", *overrides)
    assert len(list(resumed.path.glob("events.out.tfevents.*"))) == 2
    for tag in sorted(set(events(luq_run).Tags()["scalars"]) - {"images_per_second", "mean_images_per_second"}):
        assert points(resumed, tag) == points(luq_run, tag), tag
    for tag in events(luq_run).Tags()["histograms"]:
        steps = [[row.step for row in events(folder).Histograms(tag)] for folder in (resumed, luq_run)]
        assert steps[0] == steps[1]
    assert session(resumed) == session(luq_run)


def test_a_run_that_starts_over_has_no_points_of_the_first_attempt(tmp_path, monkeypatch, fp32_run):
    interrupted(monkeypatch, tmp_path / "run", 6, "quant=fp32")  # before any checkpoint
    _, again = train(tmp_path / "run", "quant=fp32")
    assert points(again, "loss") == points(fp32_run, "loss")


def stopped_at_the_end_of_an_epoch(path, *overrides):
    """Asked to stop in the last step of the first epoch: the checkpoint has all its steps and none of its results."""
    requests, folder = Requests(), RunFolder(path)
    path.mkdir()

    def asked(self, micro_batches, step=Trainer.train_step):
        if self.progress["step"] == 7:
            requests.handle(signal.SIGTERM, None)
        return step(self, micro_batches)

    with (
        mock.patch.object(Trainer, "train_step", asked),
        quiet_machine(path.parent / "cache"),
        pytest.raises(Stopped),
    ):
        run_training(tiny(*overrides), folder, requests)
    return folder


@pytest.mark.parametrize("harm", ["interrupted before its next checkpoint", "last.pt damaged"])
def test_results_of_an_epoch_are_points_once_though_its_last_step_is_in_the_checkpoint(
    tmp_path, monkeypatch, fp32_run, harm
):
    overrides = ("quant=fp32", "tracking.checkpoint_every=0")
    folder = stopped_at_the_end_of_an_epoch(tmp_path / "run", *overrides)
    if harm == "last.pt damaged":
        train(folder.path, *overrides)
        (folder.path / "summary.json").unlink()
        (folder.checkpoints / "last.pt").write_bytes(b"")
    else:

        def interrupt(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(folder.path, *overrides)
    train(folder.path, *overrides)
    for tag in ("loss", "val/top1", "train/loss"):
        assert points(folder, tag) == points(fp32_run, tag)


def test_a_fine_tune_killed_before_its_first_checkpoint_has_hyper_parameters(tmp_path, monkeypatch, fp32_run):
    overrides = ("quant=fp32", "finetune=fnt1", f"resume={fp32_run.checkpoints / 'last.pt'}")
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_write_hyper_parameters", lambda *what: None)  # as if they had not come to disk
        interrupted(monkeypatch, tmp_path / "run", 10, *overrides)
    _, folder = train(tmp_path / "run", *overrides)
    assert session(folder)[0]["finetune.name"] == "fnt1"


@pytest.mark.parametrize("behind", [5, 7200, 10**10])
def test_with_a_clock_that_was_set_back_all_points_are_shown_and_their_times_do_not_go_back(
    tmp_path, monkeypatch, luq_run, behind
):
    overrides = ("finetune=fnt1", "tracking.histogram_every=5", "tracking.checkpoint_every=5")
    interrupted(monkeypatch, tmp_path / "run", 7, *overrides)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: max(now() - behind, 0.0))
    interrupted(monkeypatch, tmp_path / "run", 13, *overrides)
    monkeypatch.undo()
    _, resumed = train(tmp_path / "run", *overrides)
    assert len(list(resumed.path.glob("events.out.tfevents.*"))) == 3
    for tag in ("loss", "val/top1", f"quantization/relative_error/{LAYERS[0]}/weight"):
        assert points(resumed, tag) == points(luq_run, tag)
    times = [event.wall_time for event in events(resumed).Scalars("loss")]
    assert times == sorted(times)
    assert session(resumed) == session(luq_run)


def test_a_clock_that_is_set_back_while_the_run_lasts(tmp_path, monkeypatch):
    file, now = EventFile(tmp_path), time.time
    file.add(scalar("loss", 1.0), 1)
    monkeypatch.setattr(time, "time", lambda: now() - 100)
    file.add(scalar("loss", 2.0), 2)
    file.close()
    first, second = events(RunFolder(tmp_path)).Scalars("loss")
    assert second.wall_time >= first.wall_time
    assert EventFile(tmp_path).path.name > file.path.name


def test_files_of_curves_are_named_in_the_order_of_their_making(tmp_path, monkeypatch):
    """TensorBoard reads them by name, in which a process number follows the second."""
    for number in (99999, 100001, 100002):
        monkeypatch.setattr("os.getpid", lambda number=number: number)
        Tracker(tiny("quant=fp32"), RunFolder(tmp_path), FINAL_METRICS, done=0).close()
    names = sorted(path.name for path in tmp_path.glob("events.*"))
    assert [name.split(".")[-2] for name in names] == ["99999", "100001", "100002"]


def test_a_fine_tune_of_another_run_has_hyper_parameters_too(tmp_path, fp32_run):
    _, tuned = train(tmp_path / "run", "quant=fp32", "finetune=fnt1", f"resume={fp32_run.checkpoints / 'last.pt'}")
    values, names, _ = session(tuned)
    assert values["finetune.name"] == "fnt1"
    assert names == session(fp32_run)[1]


def test_the_health_of_a_step_is_that_of_its_own_quantization(tmp_path):
    with quiet_machine(tmp_path / "cache"):
        run = build_trainer(tmp_path / "run", "tracking.health_every=1")
        images, labels = run.data.train.batch(torch.arange(32).numpy(), None)
        name, layer = next(iter(quantized_layers(run.model)))
        weight = layer.weight.detach().clone()
        run.train_step([(images, labels)])
        run.tracker.close()
    values = layer.recipe.weight.quantize(weight).dequantize()
    error = ((values - weight).norm() / weight.norm()).item()
    assert points(run.folder, f"quantization/relative_error/{name}/weight") == [(1, pytest.approx(error, rel=1e-4))]
