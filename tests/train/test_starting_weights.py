"""model.weights: a run starts from the weights of a file, in every network, or is refused in one line."""

import pytest
import torch
from running import composed, last, quiet_machine, tiny, train
from safetensors.torch import save_file
from torch import nn

from luqrun.cli.validation import to_config, validate
from luqrun.errors import UserError
from luqrun.quant.recipe import Recipe
from luqrun.runs.identity import run_id
from luqrun.tasks import build_task, fingerprint_data
from luqrun.train import setup
from luqrun.train.schedules import rate_of_step

CPU = torch.device("cpu")
SENTENCES = (
    *("dataset=sentences", "model=transformer_tiny", "schedule=sentences", "dataset.examples=60"),
    *("dataset.batch_tokens=200", "dataset.vocabulary=150", "dataset.max_length=24", "dataset.batch_size=8"),
)
FACTS = ("dataset=facts", "model=bert_tiny", "schedule=facts", "dataset.examples=64", "dataset.batch_size=8")
NETWORKS = {
    **{name: (f"model={name}",) for name in ("resnet8", "resnext8", "mobilenet_tiny", "vit_tiny")},
    "transformer_tiny": SENTENCES,
    "bert_tiny": FACTS,
}


def of(*overrides):
    text = any(each.startswith("dataset=") for each in overrides)
    return to_config(composed("device=cpu", "finetune=none", *overrides)) if text else tiny(*overrides)


def built(config) -> nn.Module:
    with quiet_machine():
        return setup.build(config, Recipe.from_config(config.quant), build_task(config), CPU)


def refusal(*overrides) -> str:
    with pytest.raises(UserError) as error:
        built(of(*overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, tensors):
    save_file({name: each.detach().clone().contiguous() for name, each in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """By network, its weights under another seed, and their file."""
    folder, found = tmp_path_factory.mktemp("weights"), {}
    for name, overrides in NETWORKS.items():
        state = built(of(*overrides, "seed=7", "quant=fp32")).state_dict()
        found[name] = state, write(folder / f"{name}.safetensors", state)
    return found


@pytest.mark.parametrize("quant", ["fp32", "luq_hindsight"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_starts_from_a_file(name, quant, states):
    state, path = states[name]
    overrides = *NETWORKS[name], f"quant={quant}"
    found = built(of(*overrides, f"model.weights={path}")).state_dict()
    drawn = built(of(*overrides)).state_dict()
    assert all(torch.equal(found[each], tensor) for each, tensor in state.items())
    assert any(not torch.equal(drawn[each], tensor) for each, tensor in state.items())
    assert all(each.endswith("_hindsight") for each in found.keys() - state.keys())
    assert (found.keys() > state.keys()) == (quant == "luq_hindsight")


def test_half_precision_and_missing_counts_of_batches_are_taken(states, tmp_path):
    state, _ = states["resnet8"]
    halves = {name: each.half() for name, each in state.items() if not name.endswith("num_batches_tracked")}
    path = write(tmp_path / "half.safetensors", halves)
    found = built(of(f"model.weights={path}")).state_dict()
    assert all(torch.equal(found[name], each.float()) for name, each in halves.items())


def test_ranges_from_earlier_steps_are_taken_and_left_out_where_there_are_none(trained, tmp_path):
    path = trained("quant=luq_hindsight").checkpoints / "last.pt"
    stored = torch.load(path, weights_only=True)["model"]
    ranges = [name for name in stored if name.endswith("_hindsight")]
    found = built(of(f"model.weights={path}", "quant=luq_hindsight")).state_dict()
    assert ranges
    assert all(torch.equal(found[name], stored[name]) for name in ranges)
    assert found.keys() - built(of(f"model.weights={path}", "quant=luq")).state_dict().keys() == set(ranges)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_tiny", "vit_tiny", "bert_tiny"])
def test_a_head_of_other_classes_is_refused_and_drawn_when_asked_for(name, states, tmp_path):
    state, _ = states[name]
    head = {"resnet8": "fc", "mobilenet_tiny": "classifier.1", "vit_tiny": "heads.head"}.get(name, "qa_outputs")
    sizes = {each: torch.ones(3, *tensor.shape[1:]) for each, tensor in state.items() if each.startswith(f"{head}.")}
    path, overrides = write(tmp_path / "w.safetensors", {**state, **sizes}), NETWORKS[name]
    text = refusal(*overrides, f"model.weights={path}")
    assert f"{path}: {head}." in text
    assert f"model.new_head=true draws a new {head}" in text
    found = built(of(*overrides, f"model.weights={path}", "model.new_head=true")).state_dict()
    drawn = built(of(*overrides)).state_dict()
    for each, tensor in found.items():
        assert torch.equal(tensor, drawn[each] if each in sizes else state[each]), each
    without = write(tmp_path / "none.safetensors", {each: state[each] for each in state if each not in sizes})
    assert f"{without} has no {head}: missing {head}." in refusal(*overrides, f"model.weights={without}")
    again = built(of(*overrides, f"model.weights={without}", "model.new_head=true")).state_dict()
    assert all(torch.equal(again[each], found[each]) for each in found)


def test_missing_and_unexpected_names_are_told(states, tmp_path):
    state, _ = states["resnet8"]
    changed = {name: each for name, each in state.items() if not name.startswith("layer2")}
    path = write(tmp_path / "w.safetensors", {**changed, "extra.weight": torch.ones(1)})
    text = refusal(f"model.weights={path}")
    assert "is of another network: missing layer2.0.conv1.weight, layer2.0.bn1.weight, layer2.0.bn1.bias and" in text
    assert "not expected extra.weight; model.name, model.stem and the names of" in text


def test_another_network_s_checkpoint_is_named_by_what_it_is_of(trained):
    path = trained().checkpoints / "last.pt"
    text = refusal("model=vit_tiny", f"model.weights={path}")
    assert f"{path} (of a run with model.name=resnet8, dataset.name=glyphs, quant.name=luq)" in text
    assert text.endswith("model and dataset are to be as in that run")


def test_shapes_and_types_that_do_not_fit_are_told(states, tmp_path):
    state, _ = states["resnet8"]
    colours = write(tmp_path / "rgb.safetensors", {**state, "conv1.weight": torch.ones(16, 3, 3, 3)})
    text = refusal(f"model.weights={colours}")
    assert f"{colours}: conv1.weight has the shape [16, 3, 3, 3], and the network here has [16, 1, 3, 3]" in text
    counts = write(tmp_path / "int.safetensors", {**state, "fc.bias": torch.ones(47, dtype=torch.int32)})
    assert f"{counts}: fc.bias holds torch.int32, not floating-point numbers" in refusal(f"model.weights={counts}")


def test_the_subwords_of_a_run_go_with_its_weights(tmp_path):
    with quiet_machine():
        task = build_task(of(*SENTENCES))
        other = build_task(of(*SENTENCES, "dataset.vocabulary=120"))
    assert task.data.sizes != other.data.sizes
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name, text in task.artifacts().items():
        (run / name).write_text(text)
    path = run / "checkpoints" / "last.pt"
    torch.save(task.network().state_dict(), path)
    config = of(*SENTENCES, "dataset.vocabulary=120", f"model.weights={path}")
    assert build_task(config).data.sizes == task.data.sizes
    built(config)
    (run / "tokenizer.json").write_text("{}")
    assert f"{run / 'tokenizer.json'} is no tokenizer" in refusal(*SENTENCES, f"model.weights={path}")


def test_the_sizes_of_a_bert_go_with_a_checkpoint(tmp_path):
    from questions import write_weights

    folder = write_weights(tmp_path / "bert")
    overrides = (*FACTS, "model=bert", "dataset.max_length=48", "dataset.stride=8")
    with quiet_machine():
        task = build_task(of(*overrides, f"model.weights={folder}"))
        network = task.network()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name, text in task.artifacts().items():
        (run / name).write_text(text)
    torch.save(network.state_dict(), run / "checkpoints" / "last.pt")
    found = built(of(*overrides, f"model.weights={run}/checkpoints/last.pt")).state_dict()
    assert all(torch.equal(found[name], each) for name, each in network.state_dict().items())


# The run


def test_the_identity_of_a_run_has_the_content_of_the_file(states, tmp_path):
    state, path = states["resnet8"]
    plain, config = tiny(), tiny(f"model.weights={path}")
    names = {run_id(plain, fingerprint_data(plain)), run_id(config, fingerprint_data(config))}
    assert len(names) == 2
    moved = write(tmp_path / "moved.safetensors", state)
    again = tiny(f"model.weights={moved}")
    assert run_id(again, fingerprint_data(again)) in names
    other = tiny(f"model.weights={write(tmp_path / 'other.safetensors', {**state, 'fc.bias': torch.ones(47)})}")
    headless = tiny(f"model.weights={path}", "model.new_head=true")
    names |= {run_id(each, fingerprint_data(each)) for each in (other, headless)}
    assert len(names) == 4
    assert run_id(tiny("model.new_head=false"), {}) == run_id(tiny(), {})


def test_a_run_says_from_what_it_started(states, tmp_path, caplog):
    _, path = states["resnet8"]
    with caplog.at_level("INFO"):
        _, folder = train(tmp_path / "run", f"model.weights={path}", "schedule.lr=1e-6", "model.new_head=true")
    assert f"model.weights: 54 tensors of {path}; fc is new" in caplog.text
    assert folder.run()["data"] == fingerprint_data(tiny(f"model.weights={path}"))


def test_a_fine_tune_of_given_weights_alone(trained, tmp_path):
    base = trained("quant=luq")
    start = torch.load(base.checkpoints / "last.pt", weights_only=True)["model"]
    overrides = "quant=luq", f"model.weights={base.checkpoints / 'last.pt'}", "schedule.epochs=0", "finetune=fnt1"
    validate(tiny(*overrides))
    summary, folder = train(tmp_path / "run", *overrides)
    shown = ("val/top1", "val/top5", "val/loss")
    assert summary["before_finetune"] == {name: base.summary()[name] for name in shown}
    assert [each["epoch"] for each in summary["finetune"]] == [1]
    assert any(not torch.equal(each, start[name]) for name, each in last(folder)["model"].items())
    rates = [rate_of_step(tiny(*overrides).schedule, tiny(*overrides).finetune, step, 8) for step in range(8)]
    assert rates[0] == 0 < rates[1] < rates[4] == tiny(*overrides).finetune.lr_base
    again, _ = train(tmp_path / "again", *overrides)
    assert again["val/loss"] == summary["val/loss"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.new_head=true",), "model.new_head=true is for model.weights=FILE"),
        (("model.weights=''",), "model.weights= is empty"),
        (("schedule.epochs=0", "finetune=fnt1"), "schedule.epochs=0 is too small; it must be at least 1, or 0 to"),
        (("schedule.epochs=0", "model.weights=w.pt"), "with finetune.epochs above 0"),
        (("job=evaluate",), "job=evaluate needs model.weights=FILE"),
        (("job=evaluate", "model.weights=w.pt", "model.new_head=true"), "model.new_head=true does not go with"),
        (("job=evaluate", "model.weights=w.pt", "resume=base"), "resume=base is for job=train"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(overrides, words):
    with pytest.raises(UserError) as error:
        validate(tiny(*overrides))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_told_before_anything_starts():
    with pytest.raises(UserError, match=r"model\.weights=nowhere\.pt: there is no such file or folder"):
        fingerprint_data(tiny("model.weights=nowhere.pt"))
