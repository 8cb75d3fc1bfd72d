"""A library's integer unit that computes something else is noticed, named once and not used."""

import logging
import threading
from typing import NamedTuple

import pytest
import torch
from int8_inputs import GEOMETRIES, assert_exact, codes, conv, exact, operands, take

from luqrun.quant.kernels.cpu import int8, int8_direct, int8_library, int8_products
from luqrun.quant.kernels.cpu.proofs import Proofs, random_codes

REAL_INT_MM = torch._int_mm


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    take(monkeypatch, "libraries")
    for proofs in (int8_library.proven_direct, int8_products.proven):
        monkeypatch.setattr(proofs, "verdicts", {})


def warnings(caplog):
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def right(images, packed, kind):
    """What a unit has to return: on any CPU, in float64; `packed` is the weight's matrix itself."""
    weight = packed.t().reshape(kind.out_channels, *kind.kernel, kind.channels).permute(0, 3, 1, 2)
    out = torch.nn.functional.conv2d(images.permute(0, 3, 1, 2).double(), weight.double(), None, kind.stride)
    return out.permute(0, 2, 3, 1).reshape(-1, kind.out_channels).float()


def one_number(images, packed, kind):
    out = right(images, packed, kind)
    out[-1, -1] += 1
    return out


def saturating(images, packed, kind):
    return right(images, packed, kind).clamp(max=2**15 - 1)


def signed_activations(images, packed, kind):
    return right(images.view(torch.int8), packed, kind)


def other_shape(images, packed, kind):
    raise RuntimeError("it returns (1, 2)\nin two lines")


def other_arguments(images, packed, kind):
    raise TypeError("14 arguments are too many")


CONVOLUTIONS = [one_number, saturating, signed_activations, other_shape, other_arguments]


@pytest.fixture
def convolution(monkeypatch):
    """convolution(f) -> the kernels asked for: oneDNN's convolution is f for tall ones from here on, else right."""
    asked = []

    def use(function):
        def convolve(images, packed, kind):
            asked.append(kind.kernel)
            return (function if kind.kernel[0] > kind.kernel[1] else right)(images, packed, kind)

        monkeypatch.setattr(int8_direct, "pack", lambda matrix, kernel, stride: matrix)
        monkeypatch.setattr(int8_direct, "convolve", convolve)
        monkeypatch.setattr(int8_library, "prefers_direct", lambda patches, channels: True)
        monkeypatch.setattr(int8_library, "has_direct_conv", lambda: True)
        return asked

    return use


@pytest.mark.parametrize("wrong", CONVOLUTIONS)
def test_a_convolution_that_is_wrong_for_tall_kernels(wrong, convolution, caplog):
    asked, scale = convolution(wrong), torch.tensor(0.5)
    for name, kernel in (("tall", (5, 1)), ("wide", (1, 7))):
        geometry = GEOMETRIES[name]
        if name == "wide":
            geometry = geometry[0], (1, 1), *geometry[2:]
        for _ in range(3):
            a, w = operands(geometry)
            assert_exact(conv(a, w, geometry, scale), exact(a, w, geometry), scale)
        # Tried once and left alone, or tried once and used three times.
        assert asked.count(kernel) == (1 if name == "tall" else 4)
        named = warnings(caplog)
        assert len(named) == (name == "tall")
        if named:
            assert "oneDNN's int8 convolution" in named[0]
            assert "kernel=(5, 1)" in named[0]
            assert "made of patches" in named[0]
            assert "\n" not in named[0]


def test_each_class_of_weights_and_each_number_of_threads_is_shown_for_itself(convolution, monkeypatch):
    convolution(right)
    geometry = GEOMETRIES["3 x 3"]
    for largest in (1, 7, 8, 15, 127):
        a, w = operands(geometry, largest=largest)
        conv(a, w, geometry, torch.tensor(1.0))
    assert [kind.largest for kind in int8_library.proven_direct.verdicts] == [7, 15, 127]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert {kind.threads for _, kind in int8_direct.blocks(a.shape, (6, 7), 8, geometry, 7)} == {5}
    int8_products.multiply(codes(3, 4), codes(4, 5))
    assert list(int8_products.proven.verdicts)[-1].threads == 5


def test_a_unit_that_is_wrong_for_large_codes_serves_small_ones(convolution, monkeypatch, caplog):
    # As two products of codes beyond 63 saturate in int16 on CPUs without VNNI.
    def convolve(images, packed, kind):
        return right(images, packed.clamp(-63, 63), kind)

    convolution(right)
    monkeypatch.setattr(int8_direct, "convolve", convolve)
    geometry = GEOMETRIES["3 x 3"]
    for largest, named in ((7, 0), (63, 0), (64, 1)):
        a, w = operands(geometry, largest=largest)
        assert_exact(conv(a, w, geometry, torch.tensor(1.0)), exact(a, w, geometry), 1.0)
        assert len(warnings(caplog)) == named


def last_column(product, a, b):
    product[:, -1] += 1


def first_row(product, a, b):
    product[0] = product[0].roll(1)


def one_element(product, a, b):
    product[len(product) // 2, product.shape[1] // 2] ^= 1


def nothing(product, a, b):
    product.fill_(-1)


def saturated_codes(product, a, b):
    product.copy_(REAL_INT_MM(a.clamp(-100, 100), b))


def no_unit(product, a, b):
    raise NotImplementedError("no such unit")


PRODUCTS = [last_column, first_row, one_element, nothing, saturated_codes, no_unit]


@pytest.mark.parametrize("wrong", PRODUCTS)
def test_a_product_that_is_wrong_for_transposed_matrices(wrong, monkeypatch, caplog):
    asked = []

    def int_mm(a, b, out):
        REAL_INT_MM(a, b, out=out)
        asked.append(a.is_contiguous())
        if not a.is_contiguous():
            wrong(out, a, b)
        return out

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    for rows, depth, columns in ((5, 70, 9), (2, 3, 2), (130, 2, 33)):
        b = codes(depth, columns, seed=1)
        for a in (codes(rows, depth), codes(depth, rows).t()):
            asked.clear()
            for _ in range(3):
                assert torch.equal(int8_products.multiply(a, b).long(), a.long() @ b.long())
            named = warnings(caplog)
            if a.is_contiguous():
                assert asked == [True] * 4
                assert not named
            else:
                assert asked == [False]
                assert len(named) == 1
                assert f"Kind(rows={rows}, depth={depth}, columns={columns}" in named[0]
                assert "float64" in named[0]


@pytest.mark.parametrize("doubles", [1, 64, 1 << 20])
def test_products_in_float64_are_exact_a_few_rows_at_a_time(doubles, monkeypatch):
    monkeypatch.setattr(int8_products, "DOUBLES", doubles)
    for a, b in (
        (codes(7, 33), codes(33, 5)),
        (torch.full((2, 2**17), 127).char(), torch.full((2**17, 3), 127).char()),
    ):
        out = torch.empty(len(a), b.shape[1], dtype=torch.int32)
        assert torch.equal(int8_products._in_doubles(a, b, out).long(), a.long() @ b.long())


def test_layers_learn_the_same_where_no_unit_is_right(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: out.fill_(7))
    geometry = GEOMETRIES["strided"]
    a, w = operands(geometry)
    assert_exact(conv(a, w, geometry, torch.tensor(1.0)), exact(a, w, geometry), 1.0)


def test_a_cpu_whose_usual_product_is_wrong_is_not_fast(monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert int8.is_fast.__wrapped__()
    int8_products.proven.verdicts.clear()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b, out: out.fill_(7))
    assert not int8.is_fast.__wrapped__()
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("wrong", CONVOLUTIONS)
def test_a_convolution_that_is_never_right_is_not_there(wrong, convolution, monkeypatch):
    has_direct_conv = int8_library.has_direct_conv.__wrapped__
    convolution(right)
    assert has_direct_conv()
    monkeypatch.setattr(int8_direct, "convolve", wrong)
    assert not has_direct_conv()


class Work(NamedTuple):
    name: str
    size: int


def test_threads_that_meet_a_new_kind_at_once_try_it_once(caplog):
    tried, entered, release = [], threading.Event(), threading.Event()

    def trial(kind):
        tried.append(kind)
        entered.set()
        assert release.wait(30)
        return False

    proofs, found = Proofs("a unit", Work, trial, "made otherwise"), []
    threads = [threading.Thread(target=lambda: found.append(proofs("deep", 3))) for _ in range(3)]
    threads[0].start()
    assert entered.wait(30)
    for thread in threads[1:]:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(30)
    assert found == [False] * 3
    assert tried == [Work("deep", 3)]
    assert len(warnings(caplog)) == 1


def test_random_codes_have_the_whole_range_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    left, right = random_codes(5000, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert (len(left), len(right)) == (5000, 3)
    assert len(left.unique()) == 256
    assert torch.equal(random_codes(5000, 3)[0], left)
