"""Pictures of a run, and the report on it: a real one, of one epoch on few images."""

import dataclasses
import json
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from omegaconf import OmegaConf
from report_runs import hide, metrics_lines, run_json, summary_json
from running import build_trainer, composed, quiet_machine, tiny, train
from shell import ROOT

from luqrun import tasks
from luqrun.cli.validation import to_config
from luqrun.config import DatasetConfig, ModelConfig
from luqrun.quant.convert import quantized_layers, set_step
from luqrun.report.summaries import read_inputs
from luqrun.runs.folder import RunFolder, provenance
from luqrun.tasks.loader import train_loader
from luqrun.train.trainer import Trainer

CELL = ("+experiment=fig2/embedded", "quant=luq", "tracking.health_every=2", "seed=3")


def finish(folder: RunFolder, overrides) -> None:
    """What the command line adds to what the trainer writes."""
    (folder.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(tiny(*overrides))))
    folder.update_run(overrides=list(overrides), start="then", reason=None, **provenance())


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder of studies with one run."""
    folder = tmp_path_factory.mktemp("outputs")
    finish(train(folder / "embedded" / "fig2" / "run", *CELL)[1], CELL)
    return folder


@pytest.fixture
def run(outputs):
    return outputs / "embedded" / "fig2" / "run"


@pytest.fixture
def draw(outputs):
    """The command, in this process."""
    pytest.importorskip("matplotlib")
    from luqrun.report.pictures import main

    def draw(*arguments) -> int:
        with quiet_machine(outputs / "embedded" / "fig2" / "cache"):
            return main([str(each) for each in arguments])

    return draw


@pytest.fixture
def refused(draw, capsys):
    """The single line with which the command ends."""

    def refused(*arguments) -> str:
        with pytest.raises(SystemExit) as ended:
            draw(*arguments)
        text = capsys.readouterr()
        assert (ended.value.code, text.out, text.err.count("\n")) == (1, "", 1)
        assert text.err.startswith("luqrun-pictures: ")
        return text.err.removeprefix("luqrun-pictures: ").strip()

    return refused


def layer_gradients(run, layer):
    from luqrun.report.pictures import layer_gradients

    with quiet_machine(run.parent / "cache"):
        return layer_gradients(run, layer)


def copy(run, path, without=()):
    """The files that pictures read, in another folder."""
    for file in (*run.glob("*.*"), *run.glob("checkpoints/last.pt")):
        if file.name not in without:
            target = path / file.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return path


def test_a_real_run_is_read_as_the_tests_of_the_report_write_it(outputs, run):
    (record,), left_out = read_inputs([outputs])
    assert left_out == []
    assert (record.study, record.table, record.scale) == ("embedded/fig2", "fig2", "embedded")
    assert (record.row, record.column, record.seed) == ("luq", "top1", 3)
    assert record.curve == (record.value,)
    summary = json.loads((run / "summary.json").read_text())
    assert record.value == summary["val/top1"]
    assert summary.keys() == summary_json(1.0).keys()
    assert record.run.keys() == run_json("finished", []).keys() | {"data", "metric", "world_sizes"}
    written = {row["kind"]: row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    ours = {row["kind"]: row for row in map(json.loads, metrics_lines([1.0]))}
    assert {kind: row.keys() for kind, row in written.items()} == {kind: row.keys() for kind, row in ours.items()}


def test_both_pictures_appear_and_repeat_to_the_byte(draw, run, tmp_path, capsys):
    path = copy(run, tmp_path / "run")
    middle = layer_gradients(run, None).layer
    written = []
    for arguments, folder in (((), path / "pictures"), (("--layer", middle, "--out", tmp_path / "a" / "b"), None)):
        assert draw(path, *arguments) == 0
        folder = folder or tmp_path / "a" / "b"
        names = ["health.png", "health.svg", "gradients.png", "gradients.svg"]
        assert capsys.readouterr().out.splitlines() == [str(folder / name) for name in names]
        written.append({name: (folder / name).read_bytes() for name in names})
    for name, content in written[0].items():
        assert content.startswith(b"\x89PNG") if name.endswith("png") else content.rstrip().endswith(b"</svg>")
    assert written[0] == written[1]


def test_the_script_refuses_what_is_no_run_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "pictures.py"), run_name="__main__")
    assert ended.value.code == 1
    wanted = f"luqrun-pictures: {tmp_path / 'nowhere'} is not a run folder: it has no config.yaml\n"
    assert capsys.readouterr().err == wanted
    assert list(tmp_path.iterdir()) == []


def test_unknown_layers_are_refused_with_the_known_ones(refused, run, tmp_path):
    text = refused(run, "--layer", "layer9", "--out", tmp_path / "out")
    with quiet_machine(run.parent / "cache"):
        names = [name for name, _ in quantized_layers(build_trainer(tmp_path / "again", *CELL).model)]
    assert text == f"--layer layer9 is not known; allowed: {', '.join(names)}"
    assert not (tmp_path / "out").exists()


def test_without_a_checkpoint_there_is_health_and_without_curves_there_are_gradients(draw, run, tmp_path, capsys):
    events = [path.name for path in run.glob("events.*")]
    for without, left, why in (
        (["last.pt"], "health", "no picture of gradients: {run}/checkpoints/last.pt is not there"),
        (events, "gradients", "no picture of health: {run} has no curves of quantization: tracking.health_every=0, "),
    ):
        path = copy(run, tmp_path / left, without)
        assert draw(path) == 0
        text = capsys.readouterr()
        assert text.out.splitlines() == [str(path / "pictures" / f"{left}.{ending}") for ending in ("png", "svg")]
        assert text.err.startswith("luqrun-pictures: " + why.format(run=path))
        assert text.err.count("\n") == 1


def test_where_there_is_nothing_to_show_it_says_why(refused, run, tmp_path):
    path = copy(run, tmp_path / "run", ["last.pt", *(path.name for path in run.glob("events.*"))])
    text = refused(path)
    assert "has no curves of quantization" in text
    assert "last.pt is not there" in text
    assert not (path / "pictures").exists()


def test_a_damaged_checkpoint_is_refused(refused, run, tmp_path):
    path = copy(run, tmp_path / "run")
    content = (path / "checkpoints" / "last.pt").read_bytes()
    (path / "checkpoints" / "last.pt").write_bytes(content[: len(content) // 2])
    assert str(path / "checkpoints" / "last.pt") in refused(path)


@pytest.mark.parametrize("content", ["model: {name", "nonsense: 1\n", ""])
def test_a_damaged_config_is_refused(refused, run, tmp_path, content):
    path = copy(run, tmp_path / "run")
    (path / "config.yaml").write_text(content)
    assert str(path / "config.yaml") in refused(path)


def test_a_run_without_curves_of_quantization_is_refused(refused, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert "has no curves of quantization" in refused(tmp_path / "run")


def test_without_matplotlib_the_extra_is_named(run, tmp_path, monkeypatch, capsys):
    from luqrun.report.pictures import main

    hide(monkeypatch, "matplotlib")
    with pytest.raises(SystemExit):
        main([str(run), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err == "luqrun-pictures: figures need matplotlib: pip install 'luqrun[plot]'\n"


def backward(trainer, name, step):
    """The gradient of a layer's output in the trainer's network, with the draws of a step."""
    found = []
    set_step(trainer.model.train(), step)
    layer = dict(quantized_layers(trainer.model))[name]
    hook = layer.register_full_backward_hook(lambda module, given, output: found.append(output[0]))
    images, labels = next(
        iter(train_loader(trainer.data, trainer.config.dataset, trainer.config.seed, trainer.progress["epoch"]))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=trainer.config.precision == "bf16"):
        logits = trainer.model(images.to(memory_format=torch.channels_last))
    F.cross_entropy(logits.float(), labels).backward()
    hook.remove()
    return found[0]


def test_the_gradient_is_that_of_the_layer_s_output(run, tmp_path):
    found = layer_gradients(run, None)
    name, gradient = found.layer, found.values
    with quiet_machine(run.parent / "cache"):
        trainer = build_trainer(copy(run, tmp_path / "again"), *CELL)
        step = trainer.progress["step"]
        assert step == 8
        names = [name for name, _ in quantized_layers(trainer.model)]
        same, other = backward(trainer, name, step), backward(trainer, name, step + 1)
        trainer.tracker.close()
    assert name == names[len(names) // 2]
    assert gradient.dtype == torch.float32
    assert gradient.abs().max() > 0
    assert torch.equal(gradient, same)
    assert not torch.equal(gradient, other)
    assert layer_gradients(run, names[0]).values.shape[1] != gradient.shape[1]


def test_a_transformer_shows_the_layers_behind_its_attention(tmp_path):
    overrides = ("quant=luq", "model=vit_tiny", "dataset.glyphs.train_images=32", "dataset.glyphs.val_images=2")
    with quiet_machine(tmp_path / "cache"):
        trainer = build_trainer(tmp_path / "run", *overrides)
        trainer.save_checkpoint()
        trainer.tracker.close()
    finish(RunFolder(tmp_path / "run"), overrides)
    found = layer_gradients(tmp_path / "run", None)
    assert found.layer.endswith(("out_proj", "mlp.0", "mlp.3"))
    assert found.values.shape[0] == 32


def test_the_gradient_of_a_fine_tuned_run_in_bf16_says_so(pictures, tmp_path):
    overrides = ("quant=luq", "finetune=fnt1", "precision=bf16", "dataset.glyphs.train_images=32")
    with quiet_machine(tmp_path / "cache"):
        finish(train(tmp_path / "a" / "run", *overrides)[1], overrides)
        trainer = build_trainer(copy(tmp_path / "a" / "run", tmp_path / "again"), *overrides)
        found = layer_gradients(tmp_path / "a" / "run", None)
        same = backward(trainer, found.layer, trainer.progress["step"])
        trainer.tracker.close()
    assert found.state == "weights of step 2, after epoch 1 and 1 of fine-tuning; layers at 4 bits, the rest in bf16"
    assert torch.equal(found.values, same.float())
    assert torch.equal(found.values, found.values.bfloat16().float())  # fp32 has more digits
    figure = pictures.draw_gradients(found)
    assert found.state in figure.axes[0].get_title()
    assert [text.get_text() for text in figure.texts] == ["a/run"]


FACTS = ("dataset=facts", "model=bert_tiny", "schedule=facts", "dataset.examples=64", "device=cpu", "dataset.workers=0")


@pytest.mark.parametrize("text", [False, True])
def test_the_file_of_weights_that_a_run_began_with_may_be_gone(tmp_path, text):
    if text:
        pytest.importorskip("transformers", reason="the extra text is not installed")
    overrides = FACTS if text else ("quant=luq", "dataset.glyphs.train_images=32")
    config = to_config(composed(*overrides)) if text else tiny(*overrides)
    found = []
    with quiet_machine(tmp_path / "cache"):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            trainer = Trainer(config, RunFolder(tmp_path / name), torch.device("cpu"))
            trainer.save_checkpoint()
            trainer.tracker.close()
            path = tmp_path / name / "config.yaml"
            path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
            config.model.weights = str(tmp_path / "a" / "checkpoints" / "last.pt")
    for each in (tmp_path / "a").rglob("last.pt"):
        found.append(layer_gradients(tmp_path / "a", None).values)
        each.unlink()
    found.append(layer_gradients(tmp_path / "b", None).values)
    assert torch.equal(*found)


@pytest.fixture
def pictures():
    pytest.importorskip("matplotlib")
    from luqrun.report import pictures

    yield pictures
    pictures.pyplot().close("all")


def test_shares_below_the_levels_by_hand(pictures):
    # Relative to the maximum: 1, 2^-3, 2^-5, 2^-7 and a zero. e3m0 reaches down to 2^-6, int4 to 1/7, e1m0 to 1.
    gradient = torch.tensor([[4.0, -0.5], [0.125, -4 / 128]])
    values = torch.cat([gradient.flatten(), torch.zeros(1)])
    figure = pictures.draw_gradients(pictures.LayerGradient("conv", values, "in some state", "study/run"))
    above, below = figure.axes
    assert "conv" in above.get_title()
    assert "20.0% are zero" in above.get_title()
    rows = dict(zip(pictures.SHOWN, reversed(range(len(pictures.SHOWN))), strict=True))
    shares = {round(text.get_position()[1]): text.get_text() for text in below.texts}
    wanted = {"e3m0": "25% below", "int4": "75% below", "e1m0": "75% below"}
    assert all(shares[rows[name]].startswith(text) for name, text in wanted.items())
    levels = {round(line.get_ydata()[0]): sorted(line.get_xdata()) for line in below.lines}
    assert levels[rows["e3m0"]] == [-6, -5, -4, -3, -2, -1, 0]
    assert len(levels[rows["int4"]]) == 7
    assert [label.get_text() for label in below.get_yticklabels()] == list(reversed(pictures.SHOWN))


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_a_distribution_is_refused(pictures, value):
    with pytest.raises(ValueError, match="the gradient of conv is zero or not finite"):
        pictures.draw_gradients(pictures.LayerGradient("conv", torch.full((3,), value), "", ""))


def test_health_has_a_curve_for_each_layer_operand_and_metric(pictures, run):
    figure = pictures.draw_health(run)
    layers = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(layers) == len(set(layers)) > 3
    assert len(figure.axes) == 3 * 3
    assert [axes.get_title() for axes in figure.axes[:3]] == ["activation", "gradient", "weight"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["clipped share", "underflow share", "relative error"]
    for axes in figure.axes:
        assert len(axes.lines) == len(layers)
        assert {tuple(line.get_xdata()) for line in axes.lines} == {(1, 3, 5, 7)}
    errors = [line.get_ydata() for line in figure.axes[8].lines]
    assert all(0 < value < 1 for values in errors for value in values)


def test_a_run_without_quantizers_has_no_pictures(pictures, run, tmp_path):
    path = copy(run, tmp_path / "run")
    config = OmegaConf.load(path / "config.yaml")
    config.quant = composed("quant=fp32").quant
    OmegaConf.save(config, path / "config.yaml")
    with pytest.raises(ValueError, match="quant=fp32 quantizes no layer"):
        layer_gradients(path, None)


def test_the_gradient_of_another_task(tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.MODULES, "words", "labelling")
    dataset, model = DatasetConfig(name="words", batch_size=8), ModelConfig(name="tagger")
    config = dataclasses.replace(tiny("quant=luq"), dataset=dataset, model=model)
    (tmp_path / "run").mkdir()
    with quiet_machine(tmp_path / "cache"):
        trainer = Trainer(config, RunFolder(tmp_path / "run"), torch.device("cpu"))
        trainer.save_checkpoint()
        trainer.tracker.close()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    found = layer_gradients(tmp_path / "run", None)
    assert found.layer in ("1", "3")
    assert found.values.shape[:2] == (8, 9)  # words and their letters
    assert found.values.abs().max() > 0
