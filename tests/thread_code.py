"""The kernels from several threads and processes, as a script: what goes wrong there ends or stops a process.

Prints the name of each scenario that went well. It runs on two threads, whatever the tests have.
"""

import copy
import faulthandler
import multiprocessing
import threading
import traceback

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import luqrun
from luqrun.quant.encoding import Encoding
from luqrun.quant.formats import FORMATS
from luqrun.quant.grids import Lines, grid_of
from luqrun.quant.kernels import blocks, reference
from luqrun.quant.kernels.cpu import backend as cpu
from luqrun.quant.kernels.cpu import int8
from luqrun.quant.kernels.cpu.driver import THREADED, threads_for
from luqrun.quant.kernels.cpu.sizes import CHUNK
from luqrun.quant.kernels.layout import is_channels_last
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.quantizer import Quantizer

LIMIT = 300  # seconds for a scenario, of which the first compiles
SIZE = 3 * CHUNK + 77
E3M0, TRUE, SCALE = FORMATS["e3m0"], torch.tensor(True), torch.tensor(0.05)
DRAWN = Encoding("e3m0", rounding="stochastic")


def tensor(seed, size=SIZE):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def draw(backend, seed, x):
    return backend.encode(x, SCALE, TRUE, DRAWN, make_stream(seed), packed=True, observe=True)


def everything(seed, size=SIZE):
    """What each kernel makes of a tensor that has work for two threads."""
    x = tensor(seed, size)
    found = [*draw(cpu, seed, x), cpu.statistics(x, True)]
    found += Quantizer("int4", "sawb", "stochastic").run(x, make_stream(seed), None, torch.bfloat16, True)
    found += Quantizer("e3m0", "hindsight").run(x.bfloat16(), make_stream(seed), SCALE * 50, torch.int8, True)
    image = x[: 4 * 8 * 20 * 20 * 3].view(12, 8, 20, 20).to(memory_format=torch.channels_last)
    found += draw(cpu, seed, image)
    found.append(cpu.unpack(found[1], (size,), False, TRUE, E3M0, torch.float32))
    found.append(cpu.relu_(x))
    found += [x, cpu.relu_backward(tensor(seed + 1, size), found[-1], False)]
    codes = found[0][: 6 * 8 * 30 * 31].view(6, 8, 30, 31).to(torch.int8)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1)
    weight = codes.view(-1)[: 3 * 3 * 8 * 5].view(5, 8, 3, 3)
    found.append(int8.conv(codes, weight, SCALE, *geometry[1:], torch.float32, False, TRUE))
    found.append(int8.conv_wgrad([codes[:, :5]], codes, *geometry))
    return found


def assert_same(found, expected):
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def in_threads(*functions):
    """Run them at once; the first error is raised here."""
    errors, ready = [], threading.Barrier(len(functions))

    def guarded(function):
        try:
            ready.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def first_use():
    """Loading the kernels and starting their threads leaves torch's number of threads alone."""
    for threads in (1, 3):
        torch.set_num_threads(threads)
        cpu.statistics(tensor(1), True)
        assert torch.get_num_threads() == threads


def number_of_threads():
    assert not THREADED or threads_for(SIZE) == 2
    assert threads_for(CHUNK) == 1
    expected = everything(1)
    assert_same(expected[:3], draw(reference, 1, tensor(1)))
    torch.set_num_threads(1)
    assert threads_for(SIZE) == 1
    assert_same(everything(1), expected)
    torch.set_num_threads(2)
    assert_same(everything(1), expected)


def two_python_threads():
    expected = {seed: everything(seed) for seed in (1, 2)}

    def work(seed):
        for _ in range(8):
            assert_same(everything(seed), expected[seed])

    in_threads(lambda: work(1), lambda: work(2))


def beside_torch():
    expected, a = everything(3), torch.randint(-8, 8, (300, 300), generator=torch.Generator().manual_seed(0)).float()
    product, total = a @ a, tensor(4).double().exp().sum()
    done = threading.Event()

    def kernels():
        try:
            for _ in range(10):
                assert_same(everything(3), expected)
        finally:
            done.set()

    def torch_operations():
        while not done.is_set():
            assert torch.equal(a @ a, product)
            torch.testing.assert_close(tensor(4).double().exp().sum(), total)

    in_threads(kernels, torch_operations)


def two_models_at_once():
    layers = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(),
        nn.Linear(9216, 5),
    )
    model = luqrun.quantize_model(nn.Sequential(*layers), luqrun.recipe("luq", samples=2), skip=())
    x = torch.randn(8, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def train(network, gradients):
        for step in range(4):
            luqrun.set_step(network, step)
            network.zero_grad()
            network(x).square().sum().backward()
            gradients.append([parameter.grad.clone() for parameter in network.parameters()])

    found = [], [], []
    train(copy.deepcopy(model), found[0])
    twins = [copy.deepcopy(model) for _ in range(2)]
    in_threads(*(lambda twin=twin, into=into: train(twin, into) for twin, into in zip(twins, found[1:], strict=True)))
    for gradients in found[1:]:
        for left, right in zip(gradients, found[0], strict=True):
            for one, other in zip(left, right, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Quantized(Dataset):
    """Items that a worker quantizes."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return draw(cpu, index, tensor(index))


def loader_workers():
    everything(1)  # this process has used its threads
    for _ in range(2):
        loader = DataLoader(Quantized(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=LIMIT)
        for index, found in enumerate(loader):
            assert_same(found, draw(reference, index, tensor(index)))
            assert_same(draw(cpu, index, tensor(index)), found)


def _child(connection):
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    x = tensor(5)
    x[0] = 1.0
    found = [*draw(cpu, 5, x), cpu.statistics(x, True), cpu.relu_(x)]
    connection.send_bytes(b"".join(each.numpy().tobytes() for each in found))


def forked():
    x = tensor(5)
    x[0] = 1.0
    found = [*draw(reference, 5, x), cpu.statistics(x, True), reference.relu_(x)]
    expected = b"".join(each.numpy().tobytes() for each in found)
    everything(1)
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        pairs = [context.Pipe(duplex=False) for _ in range(2)]
        children = [context.Process(target=_child, args=(there,), daemon=True) for _, there in pairs]
        for child in children:
            child.start()
        for (here, _), child in zip(pairs, children, strict=True):
            assert here.poll(LIMIT), "a forked process says nothing"
            assert here.recv_bytes() == expected
            child.join(LIMIT)
            assert child.exitcode == 0
        everything(1)  # and the parent goes on


def in_blocks(backend, seed):
    """What each loop of blocks makes of a tensor that has work for two threads."""
    x, found = tensor(seed)[: 3 << 16].view(3, 64, 32, 32), []
    for how, image in (
        (Encoding("e2m1", block=32, rounding="stochastic"), x),
        (Encoding("e2m1", block=16, scale_format="e4m3", eden=True), x.to(memory_format=torch.channels_last)),
        (Encoding("e2m1", block=16, scale_format="e4m3", four_over_six="mse"), x.bfloat16()),
    ):
        last = is_channels_last(image)
        lines = Lines(3 << 10, 64, 1) if last else Lines(3, 64, 1 << 10)
        values, fields, scales, _ = backend.encode_blocks(
            image, how, *grid_of(how, lines), x.abs().max(), make_stream(seed), 0, torch.bfloat16, True
        )
        back = backend.decode_blocks(fields, scales, x.shape, last, how, *grid_of(how, lines), torch.bfloat16)
        found += [values, fields, scales, back, backend.hadamard(image, lines.grid, lines.axis, 16, None)]
    return found


def blocks_in_any_number_of_threads():
    expected = {seed: in_blocks(blocks, seed) for seed in (1, 2)}
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        assert_same(in_blocks(cpu, 1), expected[1])

    def work(seed):
        for _ in range(4):
            assert_same(in_blocks(cpu, seed), expected[seed])

    in_threads(lambda: work(1), lambda: work(2))


SCENARIOS = (
    first_use,
    number_of_threads,
    two_python_threads,
    beside_torch,
    two_models_at_once,
    loader_workers,
    blocks_in_any_number_of_threads,
    forked,
)

if __name__ == "__main__":
    for scenario in SCENARIOS:
        torch.set_num_threads(2)
        if scenario is not forked:  # whose children would wait for a thread that they do not have
            faulthandler.dump_traceback_later(LIMIT, exit=True)
        try:
            scenario()
            print(scenario.__name__, flush=True)
        except Exception:
            traceback.print_exc()
        faulthandler.cancel_dump_traceback_later()
