"""The comparison of kernels with the reference finds other bits."""

import pytest
import torch

from luqrun.bench import same_bits

CPU = torch.device("cpu")


def test_bits_tell_what_values_hide():
    zero, void = torch.zeros(3), torch.full((3,), torch.nan)
    assert same_bits.is_same(void, void.clone())
    assert not same_bits.is_same(zero, -zero)
    assert not same_bits.is_same(zero, zero.half())
    assert not same_bits.is_same(zero, torch.zeros(4))


@pytest.mark.parametrize(
    ("operator", "kernel"), [("relu_backward", "ReLU"), ("decode_blocks", "encode in blocks: nvfp4")]
)
def test_other_bits_are_found(monkeypatch, operator, kernel):
    exact = getattr(same_bits.ops, operator)
    monkeypatch.setattr(same_bits.ops, operator, lambda *arguments: exact(*arguments).neg())
    row = same_bits.compared(kernel, CPU, 200, 1)
    assert row.right is False
    assert row.found.startswith("other bits in 8 of 24" if kernel == "ReLU" else "other bits in ")
    assert "seed 0" in row.found
