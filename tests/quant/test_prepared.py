"""Loops one after the other in one call, and such calls that are told other addresses each time."""

import pytest
import torch
from kernel_inputs import normal

from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS
from luqrun.quant.kernels.cpu import backend, driver, loops, requests
from luqrun.quant.kernels.cpu.prepared import Place, Prepared, Room
from luqrun.quant.kernels.cpu.sizes import APART, CHUNK, chunks

SIGNED = torch.tensor(True)
FORM = FORMATS["int4"], torch.int8


def coded(count, seed=0):
    """Codes and fields of int4."""
    x = normal(count) if not seed else -normal(count)
    stream = torch.zeros(6, dtype=torch.int64)
    found = backend.quantize(x, Encoding("int4"), None, stream, torch.int8, True)
    return found[0], found[3]


def there_and_back(count, fields, codes, again):
    """Fields to codes, and these to fields."""
    unpacking = loops.unpack, chunks(count), count, (count, fields, codes, SIGNED.data_ptr(), *requests.form_of(*FORM))
    packing = loops.pack, chunks(count), count, (count, codes, again, *requests.form_of(*FORM))
    return unpacking, packing


@pytest.mark.parametrize("count", [5, CHUNK, 3 * CHUNK + 7])
def test_loops_run_in_turn(count):
    expected, fields = coded(count)
    codes, again = torch.zeros_like(expected), torch.zeros_like(fields)
    driver.in_turn(*there_and_back(count, *(each.data_ptr() for each in (fields, codes, again))))
    assert torch.equal(codes, expected)
    assert torch.equal(again, fields)


@pytest.mark.parametrize("count", [6, 2 * CHUNK + 2])
def test_what_is_prepared_runs_on_other_tensors(count):
    room = Room("room")
    steps = there_and_back(count, Place("fields"), room.take(count), room.take(count // 2))
    assert room.bytes % APART == 0
    prepared = Prepared(steps, count)
    for seed in (0, 1):
        expected, fields = coded(count, seed)
        memory = torch.zeros(room.bytes, dtype=torch.uint8)
        prepared.run({"fields": fields.data_ptr(), "room": memory.data_ptr()})
        assert torch.equal(memory[:count].view(torch.int8), expected)
        begin = room.bytes - -(-(count // 2) // APART) * APART
        assert torch.equal(memory[begin : begin + count // 2], fields)


def test_places():
    assert Place("x", 3) + 4 == Place("x", 7)
    room = Room("x")
    assert [room.take(size) for size in (1, APART, APART + 1, 1)] == [
        Place("x", APART * number) for number in (0, 1, 2, 4)
    ]


def test_one_task_has_no_threads(monkeypatch):
    monkeypatch.setattr(driver, "threads_for", lambda elements: 2 if elements > CHUNK else 1)
    monkeypatch.setattr(driver.run, "address", lambda elements: 7)
    assert driver.told_of(loops.pack, 2, CHUNK + 1, ())[0] == 7
    assert driver.told_of(loops.pack, 1, CHUNK + 1, ())[0] == 0
    assert driver.told_of(loops.pack, 2, CHUNK, ())[0] == 0
