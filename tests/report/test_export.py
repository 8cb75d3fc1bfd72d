"""luqrun-export: a run's weights come back bit for bit, packed and in full precision; what is refused, in one line."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from running import composed, last, quiet_machine, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_packed import multiplied, read_packed

from luqrun.cli.validation import to_config
from luqrun.quant.convert import quantize_model
from luqrun.quant.recipe import Recipe
from luqrun.report.export import main
from luqrun.runs import checkpoint
from luqrun.runs.weights import read_weights
from luqrun.tasks import bare_network, build_task
from luqrun.train import setup

CPU = torch.device("cpu")
TEXTS = {
    "transformer_tiny": ("dataset=sentences", "model=transformer_tiny", "schedule=sentences", "dataset.examples=60"),
    "bert_tiny": ("dataset=facts", "model=bert_tiny", "schedule=facts", "dataset.examples=64"),
}


def write_run(path: Path, *overrides) -> Path:
    """A run folder as a finished run leaves it, of drawn weights."""
    of_text = any(each.startswith("dataset=") for each in overrides)
    config = to_config(composed("device=cpu", "finetune=none", *overrides)) if of_text else tiny(*overrides)
    with quiet_machine():
        task = build_task(config)
        model = setup.build(config, Recipe.from_config(config.quant), task, CPU)
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (path / "run.json").write_text(json.dumps({"status": "finished", "results": 2}))
    state, sizes = model.state_dict(), task.data.sizes
    for name in ("last.pt", "best.pt"):
        checkpoint.save(path / "checkpoints" / name, config, {}, state, {}, {"epoch": 1, "batch": 0}, sizes)
        state = {name: each + 1 if each.is_floating_point() else each for name, each in state.items()}
    return path


def with_config(folder, *overrides) -> Path:
    """The run that was trained so, with the config.yaml that the command line would have written."""
    (folder.path / "config.yaml").write_text(yaml.safe_dump(asdict(tiny(*overrides))))
    return folder.path


def exported(run: Path, *options) -> Path:
    name = "full" if "--full" in options else "packed"
    assert main([str(run), *options]) == 0
    return run / f"{name}.safetensors"


def test_a_run_s_int4_weights_are_restored_and_its_size_is_printed(trained, tmp_path, monkeypatch, capsys):
    overrides = "quant=luq", "finetune=fnt1"
    run = with_config(trained(*overrides, path=tmp_path / "run"), *overrides)
    path = exported(run)
    shown, found = capsys.readouterr().out, read_packed.read(str(path))
    network, example = bare_network(tiny(), checkpoint.read(run / "checkpoints" / "last.pt"))
    model = quantize_model(network, Recipe.from_config(tiny("quant=luq").quant), example=example)
    model.load_state_dict(checkpoint.read(run / "checkpoints" / "last.pt")["model"])
    with quiet_machine():
        model.eval().to(memory_format=torch.channels_last)
        model.forward, forward = lambda x: forward(torch.randn(2, 1, 20, 20)), model.forward
        expected = multiplied(model, monkeypatch)
    assert found.keys() == model.state_dict().keys()
    assert len(expected) == 6
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], expected.get(name, tensor)), name
    assert all(found[name].unique().numel() <= 16 for name in expected)
    assert f"{path}: {path.stat().st_size / 2**20:.2f} MiB: 73,728 weights of 6 layers in 0.04 MiB" in shown
    assert "(4.01 bits each), 50 other tensors as they are; all in full precision is 0." in shown


def test_the_metadata_say_how_to_read_it(tmp_path):
    path = exported(write_run(tmp_path / "run", "quant=nvfp4"))
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert "value = table[code] * scale * tensor_scale" in metadata["luqrun.packed"]
    assert json.loads(metadata["recipe"])["weight"]["format"] == "e2m1"
    assert (metadata["run"], metadata["RESULTS"]) == ("run", "2")
    how = json.loads(metadata["weights"])
    assert how["layer1.0.conv1.weight"]["block"] == [1, 16]
    assert how["layer1.0.conv1.weight"]["table"][:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert {f"{name}.codes" for name in how} <= names
    assert not set(how) & names


@pytest.mark.parametrize("name", TEXTS)
def test_networks_for_text_are_restored_with_their_tied_tables(name, tmp_path):
    run = write_run(tmp_path / "run", *TEXTS[name], "quant=luq")
    state, found = last_model(run), read_packed.read(str(exported(run)))
    assert found.keys() == state.keys()
    packed = [each for each in state if not torch.equal(found[each], state[each])]
    assert len(packed) >= 10
    assert all(found[each].unique().numel() <= 16 for each in packed)
    full = load_file(exported(run, "--full"))
    assert all(torch.equal(each, state[name]) for name, each in full.items())
    assert {each.data_ptr() for each in state.values()} == {state[name].data_ptr() for name in full}


def last_model(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]


def test_in_full_precision_it_is_a_state_dict_with_torchvision_s_names(trained, tmp_path, capsys):
    import torchvision.models as tv

    folder = trained("quant=luq_hindsight", path=tmp_path / "run")
    path = exported(with_config(folder, "quant=luq_hindsight"), "--full")
    found, state = load_file(path), last(folder)["model"]
    assert all(torch.equal(each, state[name]) for name, each in found.items())
    assert state.keys() - found.keys() == {name for name in state if name.endswith("_hindsight")}
    assert "MiB, in full precision, 56 tensors" in capsys.readouterr().out
    weights = read_weights(str(path))
    assert (weights.recipe, weights.origin[:18]) == ("luq_hindsight", "model.name=resnet8")
    run = write_run(tmp_path / "resnet18", "model=resnet18")
    assert load_file(exported(run, "--full")).keys() == tv.resnet18().state_dict().keys()


def test_the_best_epoch_and_another_file(tmp_path):
    run = write_run(tmp_path / "run")
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model"]
    out = tmp_path / "deep" / "best.safetensors"
    assert main([str(run), "--full", "--best", "--out", str(out)]) == 0
    assert torch.equal(load_file(out)["fc.weight"], best["fc.weight"])
    assert not (run / "full.safetensors").exists()


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(each) for each in arguments])
    text = capsys.readouterr().err
    assert end.value.code == 1
    assert text.startswith("luqrun-export: ")
    assert text.count("\n") == 1
    return text


def change(run: Path, name: str, **fields) -> None:
    content = yaml.safe_load((run / name).read_text())
    (run / name).write_text(json.dumps({**content, **fields}))


def test_what_cannot_be_exported_is_told_in_one_line(tmp_path, capsys):
    assert f"{tmp_path} is not a run folder: it has no config.yaml" in refusal(capsys, tmp_path)
    run = write_run(tmp_path / "run")
    for status in ("running", "failed"):
        change(run, "run.json", status=status)
        assert f"{run} has not finished (its status: {status}); the same command" in refusal(capsys, run)
    change(run, "run.json", status="diverged", diverged_at_step=3)
    assert f"{run} diverged at step 3: it has no weights to export" in refusal(capsys, run)
    change(run, "run.json", status="finished", reused="../other")
    assert f"{run} was taken over, and has no checkpoint: export {run / '../other'}" in refusal(capsys, run)
    change(run, "run.json", reused=None)
    change(run, "config.yaml", job="evaluate")
    assert f"{run} is of job=evaluate, which trains no weights; export the run" in refusal(capsys, run)
    change(run, "config.yaml", job="train", quant=asdict(tiny("quant=fp32").quant))
    assert f"{run}: quant=fp32 quantizes no weight in fprop; --full" in refusal(capsys, run)
    change(run, "config.yaml", quant={**asdict(tiny().quant), "skip": ["*"]})
    assert f"{run}: quant.skip leaves no layer that is quantized; --full" in refusal(capsys, run)
    change(run, "config.yaml", model={**asdict(tiny().model), "name": "vit_tiny"}, quant=asdict(tiny().quant))
    assert "is of another network: missing" in refusal(capsys, run)
    (run / "checkpoints" / "last.pt").write_bytes(b"PK")
    assert "last.pt is cut off, or not a file of torch.save" in refusal(capsys, run)
    (run / "checkpoints" / "last.pt").unlink()
    assert f"{run} has no checkpoints/last.pt, which holds the weights" in refusal(capsys, run)


def test_the_script_is_the_same_function():
    script = Path(__file__).parents[2] / "scripts" / "export.py"
    found = subprocess.run([sys.executable, script, "nowhere"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "luqrun-export: nowhere is not a run folder: it has no config.yaml\n"


def test_the_reader_without_luqrun_lists_and_refuses_in_one_line(tmp_path, capsys):
    good = exported(write_run(tmp_path / "run"))
    capsys.readouterr()
    read_packed.main([str(good)])
    assert "conv1.weight (" in capsys.readouterr().out
    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
    files = {name: tmp_path / f"{name}.safetensors" for name in ("nowhere", "cut", "plain", "keys", "json", "codes")}
    files["cut"].write_bytes(good.read_bytes()[:-5])
    tensors = load_file(good)
    save_file(tensors, files["plain"])
    save_file(tensors, files["keys"], {name: text for name, text in metadata.items() if name != "tied"})
    save_file(tensors, files["json"], {**metadata, "weights": "{"})
    short = {name: each[:-1] if name.endswith(".codes") else each for name, each in tensors.items()}
    save_file({name: each.clone() for name, each in short.items()}, files["codes"], metadata)
    words = dict.fromkeys(files, "damaged (")
    words |= {"nowhere": "No such file", "plain": "not a file of packed codes, as luqrun-export RUN writes"}
    for name, path in files.items():
        with pytest.raises(SystemExit) as end:
            read_packed.main([str(path)])
        assert str(end.value.code).startswith(f"read_packed.py: {path}: {words[name]}")
        assert "\n" not in end.value.code
    assert capsys.readouterr().out == ""
    for arguments in ([], [str(good), "more"]):
        with pytest.raises(SystemExit, match=r"usage: python scripts/read_packed\.py FILE"):
            read_packed.main(arguments)


def test_what_the_reader_refuses_ends_with_exit_code_1():
    found = subprocess.run([sys.executable, read_packed.__file__], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (1, "", "usage: python scripts/read_packed.py FILE\n")
