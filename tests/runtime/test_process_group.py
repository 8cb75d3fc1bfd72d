"""Two and three processes, gloo between them: what they share, what each has for itself, and that it adds up."""

import json

import pytest
import rank_code
import torch
from jobs import Ranks
from running import build_trainer, metrics, quiet_machine, train

from luqrun import tasks
from luqrun.errors import UserError
from luqrun.runs.folder import RunFolder
from luqrun.runtime import process_group
from luqrun.train.evaluation import evaluate


@pytest.fixture(scope="module", params=[2, 3])
def found(request, shell, tmp_path_factory):
    """(what each process found, the folder) of that many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    code, said = Ranks(shell, folder, request.param, folder, script="rank_code.py").finish()
    assert code == 0, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)], folder


def test_a_shared_range_is_that_of_the_whole_tensor(found):
    for name, quantizer in rank_code.QUANTIZERS.items():
        scale, signed, maximum = quantizer.measure(rank_code.whole())
        for each in found[0]:
            torch.testing.assert_close(each["statistics"][name][0], scale, rtol=1e-6, atol=0)
            assert each["statistics"][name][1:] == (signed, maximum)


def test_layers_with_shared_ranges_do_to_the_parts_what_one_does_to_the_whole(found):
    """Rounding to nearest draws nothing: the rows of both are the same, and with ranges of their own they are not."""
    each_one, (output, gradient) = found[0], rank_code.one_pass(rank_code.linear(rank_code.NEAREST), rank_code.whole())
    for rank, each in enumerate(each_one):
        own, shared = each["shared_ranges"]
        torch.testing.assert_close(shared[0], output[rank :: len(each_one)])
        torch.testing.assert_close(shared[1], gradient[rank :: len(each_one)])
        assert not torch.allclose(own[0], output[rank :: len(each_one)], atol=1e-3)


def test_ranks_share_the_hindsight_maximum_and_draw_apart(found):
    (maximum, first), (_, second) = (each["hindsight"] for each in found[0][:2])
    # The same gradient and scale, so only the draws can differ.
    assert not torch.equal(first[0][0], second[0][0])
    assert first[0][1] == second[0][1] == maximum
    # Then both learn the largest maximum (Eq. 18 with eta 0.1).
    assert first[1][1] == second[1][1]
    torch.testing.assert_close(first[1][1], 0.9 * len(found[0]) * maximum + 0.1 * maximum)


def test_weights_draw_alike_on_all_ranks_and_activations_apart(found):
    weights, outputs = zip(*(each["stochastic_forward"] for each in found[0]), strict=True)
    assert all(torch.equal(weights[0], other) for other in weights[1:])
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])


def test_an_evaluation_with_draws_does_not_depend_on_the_number_of_processes(found, tmp_path):
    with quiet_machine(tmp_path / "cache"):
        alone = evaluate(build_trainer(tmp_path / "run", *rank_code.EVALUATED))
    assert all(each["evaluated"] == found[0][0]["evaluated"] for each in found[0])
    assert found[0][0]["evaluated"] == alone


def test_batches_that_weigh_differently_have_the_gradient_of_the_whole_in_any_number_of_processes(
    found, tmp_path, monkeypatch
):
    monkeypatch.setitem(tasks.MODULES, "words", "labelling")
    gradient, scores = rank_code.labelled(tmp_path / "alone")
    for each in found[0]:
        torch.testing.assert_close(each["labelled"][0], gradient, rtol=1e-5, atol=1e-7)
        assert each["labelled"][1] == scores  # of predictions in the data's order, summed in that


def test_a_sharded_step_is_the_step_of_whole_parameters(found):
    for each in found[0]:
        for sharded, whole in zip(*each["sharded"], strict=True):
            torch.testing.assert_close(sharded, whole)


def test_sums_maxima_and_what_the_first_one_tells(found):
    count = len(found[0])
    for each in found[0]:
        assert each["sums"] == ([count, count * (count - 1) / 2], count - 1)
        assert each["told"] == "by 0"
        assert each["gathered"] == [{"rank": rank} for rank in range(count)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of rank_code.trained in one process."""
    return train(tmp_path_factory.mktemp("alone") / "run", *rank_code.RUN)[1]


def test_batch_learning_rate_and_evaluation_mean_the_same_for_any_number_of_processes(found, alone):
    """In full precision and without batch norm the processes compute what one does, but for the order of sums."""
    ours, theirs = metrics(RunFolder(found[1] / "run")), metrics(alone)
    assert len(ours) == len(theirs) > 5
    for one, other in zip(ours, theirs, strict=True):
        assert (one.pop("kind"), one.pop("phase")) == (other.pop("kind"), other.pop("phase"))
        assert one == pytest.approx(other, rel=1e-3)
    # Of 94 images one more or less would change top-1 by a hundredth of it.
    assert found[0][0]["trained"] == pytest.approx(
        {name: value for name, value in alone.summary().items() if name in found[0][0]["trained"]}, rel=1e-3
    )
    assert all(each["trained"] == found[0][0]["trained"] for each in found[0])


def test_the_first_alone_writes(found):
    folder, count = found[1] / "run", len(found[0])
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert json.loads((folder / "run.json").read_text())["world_size"] == count
    steps = [line["step"] for line in metrics(RunFolder(folder), "step")]
    assert steps == sorted(set(steps))


def test_what_a_dead_process_leaves_to_the_others_is_known_from_their_own_errors(monkeypatch):
    gloo = RuntimeError("[pair.cc:545] Read error [127.0.0.1]:14482: Connection reset by peer.")
    assert not process_group.lost_a_peer(gloo)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_group.lost_a_peer(gloo)
    assert process_group.lost_a_peer(RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:3493"))
    assert not process_group.lost_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), True),
        (KeyError("weight"), True),
        (BrokenPipeError(32, "Broken pipe"), True),  # of its own output, say
        (UserError("dataset.root=DIR is missing"), False),
        (RuntimeError("[pair.cc:537] Connection closed by peer [127.0.0.1]:3493"), False),  # the other is to blame
    ],
)
def test_torchrun_is_told_of_the_error_that_ended_the_job(error, told, monkeypatch, tmp_path):
    file = tmp_path / "error.json"
    for name, value in {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "0", "TORCHELASTIC_ERROR_FILE": str(file)}.items():
        monkeypatch.setenv(name, value)

    def work():
        raise error

    with pytest.raises(type(error)) as raised:
        process_group.recorded(work)()
    assert raised.value is error
    assert file.exists() == told
