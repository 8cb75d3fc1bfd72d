"""The loops of batch norm on the CPU: torch's bits, and not used where they give others."""

import pytest
import torch
from kernel_inputs import LAST, assert_all_identical, normal

from luqrun.quant.kernels import reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu import norm as kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_loops_give_torchs_bits(threads, dtype):
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(threads)
    torch.set_num_threads(threads)
    try:
        for number in range(40):
            sizes = [int(torch.randint(1, most, (), generator=generator)) for most in (9, 30, 9, 9)]
            shape = sizes[0], 8 * sizes[1], *sizes[2:]
            x, grad, other = (
                torch.randn(shape, generator=generator).to(dtype).to(memory_format=LAST) for _ in range(3)
            )
            grad = x if number % 8 == 0 else grad  # of that nothing is left but what was rounded
            channels = torch.randn(3, shape[1], generator=generator)
            mask = reference.relu_(other) if number % 3 else None
            _, *moments = reference.batch_norm(x, channels[0], None, None, None, 0.0, 1e-5)
            arguments = grad, mask, x, channels[0] if number % 4 else None, *moments, 1e-5
            found, expected = torch.ones(2, 4, dtype=torch.float64).unbind()
            ours, theirs = (
                cpu.batch_norm_backward(*arguments, found),
                reference.batch_norm_backward(*arguments, expected),
            )
            assert_all_identical((*ours, found), (*theirs, expected), shape)
            given = [each if number % 5 else None for each in (channels[1], *channels.abs()[1:])]
            given = channels[0], *given
            copies = [None if each is None else each.clone() for each in given]
            ours, theirs = cpu.batch_norm(x, *given, 0.3, 1e-3), reference.batch_norm(x, *copies, 0.3, 1e-3)
            assert_all_identical((*ours, *given), (*theirs, *copies), shape)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", ["gradients", "normalized"])
def test_loops_that_give_other_bits_are_not_used(function, monkeypatch, caplog):
    monkeypatch.setattr(kernels._proven, "verdicts", {})
    right = getattr(kernels, function)
    monkeypatch.setattr(kernels, function, lambda *a: tuple(each * (1 + 2**-20) for each in right(*a)))
    x, grad = (normal(3, 16, 4, 4, seed=seed).to(memory_format=LAST) for seed in (1, 2))
    arguments = grad, None, x, None, torch.zeros(16), torch.ones(16), 1e-5
    assert_all_identical(cpu.batch_norm_backward(*arguments), reference.batch_norm_backward(*arguments))
    rest = None, None, None, None, 0.1, 1e-5
    assert_all_identical(cpu.batch_norm(x, *rest), reference.batch_norm(x, *rest))
    assert "fewer passes" in caplog.text


@pytest.mark.parametrize("which", range(4))
def test_vectors_with_gaps_are_torchs(which):
    x, grad = (normal(3, 16, 4, 4, seed=seed).to(memory_format=LAST) for seed in (1, 2))
    given = torch.rand(4, 16)
    ours, theirs = (
        [
            torch.stack([each, -each], -1)[..., 0] if number == which else each.clone()
            for number, each in enumerate(given)
        ]
        for _ in range(2)
    )
    found, expected = cpu.batch_norm(x, *ours, 0.1, 1e-5), reference.batch_norm(x, *theirs, 0.1, 1e-5)
    assert_all_identical((*found, *ours), (*expected, *theirs))
    arguments = grad, None, x, ours[0], *found[1:], 1e-5
    assert_all_identical(cpu.batch_norm_backward(*arguments), reference.batch_norm_backward(*arguments))


def test_the_trial_is_in_float32_whatever_the_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert kernels._trial(kernels.Kind(2, 9, 16, torch.float32, 1)) or not kernels.HAS_FMA
    finally:
        torch.set_default_dtype(before)
