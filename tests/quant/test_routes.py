"""The choice between exact ways of one GEMM."""

from collections import Counter

import pytest
import torch

from luqrun.quant import routes
from luqrun.quant.routes import MOST_REFUSALS, TRIES, fastest


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that routes move, and no memory of earlier choices."""
    now = [0.0]
    monkeypatch.setattr(routes.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(routes, "_chosen", {})
    monkeypatch.setattr(routes, "_refusals", Counter())
    return now


def chosen(wanted):
    """The way that is taken first for a key."""
    (names,) = (names for (key, *names), _ in routes._chosen.items() if key == wanted)
    return routes.chosen(wanted, names[:-1])  # after these the number of threads


def route(clock, seconds, value, calls=None):
    times = iter(seconds)

    def run():
        clock[0] += next(times)
        if calls is not None:
            calls.append(value)
        return torch.full((3,), float(value))

    return run


def test_the_fastest_is_taken_from_its_second_call_on(clock):
    calls = []
    made = {
        "slow": route(clock, [2.0] * 9, 1, calls),
        "uneven": route(clock, [9.0, 1.0] + [9.0] * 9, 1, calls),  # the best of its times counts
    }
    for _ in range(3):
        assert fastest("key", made).tolist() == [1.0] * 3
    assert len(calls) == 2 * TRIES + 2
    assert clock[0] == 2.0 * TRIES + 9.0 * (TRIES - 1) + 1.0 + 18.0


def test_a_way_that_is_not_exact_is_not_taken(clock):
    made = {"exact": route(clock, [5.0] * 9, 1), "fast": route(clock, [1.0] * 9, 2)}
    for _ in range(3):
        assert fastest("key", made).tolist() == [1.0] * 3


def test_each_key_and_number_of_threads_has_a_choice_of_its_own(clock, monkeypatch):
    calls = []
    made = {"one": route(clock, [1.0] * 99, 1, calls), "other": route(clock, [2.0] * 99, 1, calls)}
    for key, threads in (("a", 1), ("b", 1), ("a", 2)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        calls.clear()
        fastest(key, made)
        assert len(calls) == 2 * TRIES
        fastest(key, made)
        assert len(calls) == 2 * TRIES + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_nan_is_equal_to_nan_and_a_wrong_number_beside_it_is_none(clock, dtype):
    value = torch.tensor([torch.nan if dtype.is_floating_point else 3, 1.0]).to(dtype)
    wrong = value.clone()
    wrong[1] = 2
    made = {"exact": lambda: value.clone(), "right": lambda: value.clone(), "wrong": lambda: wrong}
    fastest("key", made)
    assert chosen("key") == "exact"  # of equal times the first
    clock_of = {"exact": 3.0, "right": 2.0, "wrong": 1.0}

    def timed(name):
        def run():
            clock[0] += clock_of[name]
            return made[name]()

        return run

    fastest("other key", {name: timed(name) for name in made})
    assert chosen("other key") == "right"


def test_a_rehearsal_takes_every_way_and_chooses_none(clock):
    calls = []
    made = {"one": route(clock, [1.0] * 9, 1, calls), "other": route(clock, [1.0] * 9, 2, calls)}
    with routes.rehearsal():
        assert fastest("key", made).tolist() == [1.0] * 3
        with routes.rehearsal():
            pass
        fastest("key", made)
    assert calls == [1, 2, 1, 2]
    assert not routes._chosen


def test_a_choice_is_among_the_ways_that_there_are(clock):
    """A key may be of several sizes, of which some ways take a part."""
    one, other = route(clock, [2.0] * 9, 1), route(clock, [1.0] * 9, 1)
    assert fastest("key", {"one": one, "other": other}).tolist() == [1.0] * 3
    assert fastest("key", {"one": one}).tolist() == [1.0] * 3
    assert fastest("key", {"other": other}).tolist() == [1.0] * 3


def test_a_way_that_refuses_is_asked_a_few_times(clock):
    calls, fits = [], [True]

    def some():
        clock[0] += 1.0
        calls.append("some")
        return torch.ones(3) if fits[0] else None

    made = {"all": route(clock, [2.0] * 99, 1), "some": some}
    fastest("key", made)
    assert chosen("key") == "some"
    for given in (False, True, False, True, False, True):
        fits[0] = given
        calls.clear()
        assert fastest("key", made).tolist() == [1.0] * 3
    assert not calls
    assert MOST_REFUSALS == 3
    assert chosen("key") == "all"


@pytest.mark.parametrize("order", [("all", "none"), ("none", "all")])
def test_a_way_that_refuses_at_once_is_left_out(clock, order):
    made = {"all": route(clock, [2.0] * 99, 1), "none": lambda: None}
    for _ in range(2):
        assert fastest("key", {name: made[name] for name in order}).tolist() == [1.0] * 3
    assert chosen("key") == "all"


def test_what_nobody_tried_is_not_chosen(clock):
    assert routes.chosen("key", ("a", "b")) is None
    fastest("key", {"a": route(clock, [2] * TRIES, 1), "b": route(clock, [1] * TRIES, 1)})
    assert routes.chosen("key", ("a", "b")) == "b"
    assert routes.chosen("key", ("a",)) is routes.chosen("other", ("a", "b")) is None
