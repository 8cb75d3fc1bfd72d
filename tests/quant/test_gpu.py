"""What only a GPU can show: a step that the host never waits for, exact GEMMs, and the compiler on Triton's kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import E3M0, HINDSIGHT, INT4, LUQ, quantize
from running import build_trainer, quiet_machine
from torch import nn

from luqrun.bench import run as benchmark
from luqrun.quant.convert import set_step
from luqrun.quant.function import dgrad, fprop, wgrad
from luqrun.quant.gemms import ConvOp, LinearOp
from luqrun.quant.kernels import ops
from luqrun.quant.kernels.philox import make_stream
from luqrun.quant.operands import Operand, rescale
from luqrun.quant.quantizer import Quantizer
from luqrun.quant.recipe import Recipe

pytestmark = pytest.mark.gpu
LAST = torch.channels_last
SMP = Recipe.of("smp", INT4, INT4, Quantizer("e3m0", rounding="stochastic", samples=2))
BLOCKS = Recipe.of(
    "blocks",
    Quantizer("e2m1", block=(16, 16), scale_format="e4m3"),
    Quantizer("e2m1", block=16, scale_format="e4m3", four_over_six="mse"),
    Quantizer("e2m1", block=32, rounding="stochastic"),
)
RECIPES = pytest.mark.parametrize("recipe", [LUQ, SMP, HINDSIGHT], ids=lambda recipe: recipe.name)
PRECISIONS = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def network(recipe):
    """A quantized network that moves to the GPU after it was quantized, as a run's does."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2), nn.Flatten(), nn.Linear(32 * 9, 10),
    )  # fmt: skip
    return quantize(model, recipe).to("cuda", memory_format=LAST)


def step(model, run, optimizer, x, labels, bf16):
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        output = run(x)
    F.cross_entropy(output.float(), labels).backward()
    optimizer.step()
    return output.detach()


def batch():
    return torch.randn(16, 8, 8, 8, device="cuda").to(memory_format=LAST), torch.arange(16, device="cuda") % 10


@pytest.mark.parametrize("recipe", [LUQ, SMP, HINDSIGHT, BLOCKS], ids=lambda recipe: recipe.name)
@PRECISIONS
def test_the_host_never_waits_in_a_step(recipe, bf16):
    model, (x, labels) = network(recipe), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, model, optimizer, x, labels, bf16)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        set_step(model, 1)
        output = step(model, model, optimizer, x, labels, bf16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.isfinite().all()


def test_the_trainer_waits_for_nothing_but_the_sums_of_a_step(tmp_path, monkeypatch):
    with quiet_machine(tmp_path):
        trainer = build_trainer(tmp_path / "run", "precision=bf16", device="cuda")
        monkeypatch.setattr(trainer, "_add_up", lambda passes: {})
        images = torch.randn(32, trainer.data.channels, trainer.data.image_size, trainer.data.image_size)
        batch = [(images, torch.arange(32) % 10)]
        trainer.model.train()
        trainer.accumulate_gradients(batch, record_health=False)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.accumulate_gradients(batch, record_health=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.tracker.close()


@RECIPES
@PRECISIONS
def test_a_moved_model_compiles_whole_and_trains_as_an_eager_one(recipe, bf16, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, (x, labels) = network(recipe), batch()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (model, twin)]
    for number in range(3):
        set_step(model, number), set_step(twin, number)
        eager = step(model, model, optimizers[0], x, labels, bf16)
        torch.testing.assert_close(step(twin, compiled, optimizers[1], x, labels, bf16), eager, rtol=0.02, atol=0.02)


def codes(*shape, limit, memory_format=torch.contiguous_format):
    return torch.randint(-limit, limit + 1, shape).to(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("channels", [16, 256])
def test_convolutions_of_codes_are_exact(memory_format, kernel, channels):
    # No algorithm of cuDNN may be one that rounds between products and sums, as Winograd's and Fourier's are.
    op = ConvOp((1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    a = codes(8, channels, 14, 14, limit=7, memory_format=memory_format)
    w = codes(32, channels, kernel, kernel, limit=7, memory_format=memory_format)
    powers = codes(8, 32, 14, 14, limit=6, memory_format=memory_format)
    g = powers.sign() << powers.abs()
    one = torch.ones((), device="cuda")
    a_op, w_op, g_op = (Operand((each.float().cuda(),), one) for each in (a, w, g))
    expected = F.conv2d(a.double(), w.double(), padding=kernel // 2)
    assert torch.equal(fprop(op, a_op, w_op, torch.float32).cpu().double(), expected)
    found = dgrad(op, g_op, w_op, a.shape, torch.float32)
    assert torch.equal(found.cpu().double(), F.conv_transpose2d(g.double(), w.double(), padding=kernel // 2))
    expected = torch.nn.grad.conv2d_weight(a.double(), w.shape, g.double(), padding=kernel // 2)
    assert torch.equal(wgrad(op, g_op, a_op, w.shape, torch.float32).cpu().double(), expected)


def test_products_of_codes_are_exact():
    a, w = codes(512, 3072, limit=15), codes(768, 3072, limit=7)
    one = torch.ones((), device="cuda")
    found = fprop(LinearOp(), *(Operand((each.float().cuda(),), one) for each in (a, w)), torch.float32)
    assert torch.equal(found.cpu().double(), a.double() @ w.double().t())


def test_a_bf16_product_is_rescaled_by_a_float32():
    product, scale = torch.randn(4096, device="cuda").bfloat16(), torch.tensor(0.123456789, device="cuda")
    expected = (product.float() * scale).bfloat16()
    assert torch.equal(rescale(product, Operand((product,), scale)), expected)


def test_operators_keep_their_promises():
    stream = make_stream(5, 3, 2, 7, 1, 4).cuda()
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    for x in (torch.randn(1031, device="cuda"), torch.randn(2, 6, 5, 4, device="cuda").to(memory_format=LAST)):
        for quantizer in (INT4, E3M0):
            arguments = (x, quantizer.encoding.key, None, stream, torch.bfloat16, True)
            torch.library.opcheck(torch.ops.luqrun.quantize, arguments, test_utils=checks)
        mask = ops.relu_(x.clone())
        torch.library.opcheck(torch.ops.luqrun.relu_, (x.clone(),), test_utils=checks)
        arguments = x, mask, x.dim() == 4
        torch.library.opcheck(torch.ops.luqrun.relu_backward, arguments, test_utils=checks)


def test_the_benchmark_runs(tmp_path):
    record = benchmark.run(tmp_path, quick=True, device="cuda", log=lambda text: None)
    assert record["machine"]["device"] == "cuda"
    assert {row["device"] for row in record["requirements"] if row["measured"]} == {"cuda"}
