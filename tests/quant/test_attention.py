"""QuantMultiheadAttention: the numbers of nn.MultiheadAttention, with its projections on codes."""

import copy

import pytest
import torch
from layers import INT4, NOTHING, quantize, train_step, values
from torch import nn

from luqrun.errors import UserError
from luqrun.quant.attention import QuantMultiheadAttention
from luqrun.quant.layers import QuantLinear
from luqrun.quant.recipe import Recipe


def attention_inputs(batch_first, length=5, source=7, batch=3, width=8):
    query, memory = torch.randn(batch, length, width), torch.randn(batch, source, width)
    return (query, memory) if batch_first else (query.transpose(0, 1), memory.transpose(0, 1))


MASKS = {
    "none": {},
    "bool": {"attn_mask": "bool"},
    "float": {"attn_mask": "float"},
    "per head": {"attn_mask": "heads"},
    "padding": {"key_padding_mask": "bool"},
    "float padding": {"key_padding_mask": "float"},
    "both": {"attn_mask": "bool", "key_padding_mask": "bool"},
}


def make_masks(kinds, length, source, batch=3, heads=2):
    masks = {}
    for name, kind in kinds.items():
        shape = (batch, source) if name == "key_padding_mask" else (length, source)
        shape = (batch * heads, length, source) if kind == "heads" else shape
        mask = torch.rand(shape) < 0.3
        mask[..., 0] = False  # no row without any key
        masks[name] = mask if kind == "bool" else torch.randn(shape).masked_fill(mask, -torch.inf)
    return masks


@pytest.mark.parametrize("kinds", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_without_quantizers_is_torchs(batch_first, cross, kinds):
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    nn.init.normal_(plain.in_proj_bias)
    layer = QuantMultiheadAttention.from_module(copy.deepcopy(plain), NOTHING, 0, 0)
    query, memory = attention_inputs(batch_first)
    inputs = (query, memory, memory) if cross else (query, query, query)
    masks = make_masks(kinds, 5, 7 if cross else 5)
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        expected, found = plain(*inputs, **masks, **options), layer(*inputs, **masks, **options)
        torch.testing.assert_close(found[0], expected[0])
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1])
    expected[0].sin().sum().backward()
    found[0].sin().sum().backward()
    for left, right in zip(plain.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_of_three_inputs_unbatched_and_causal(bias):
    plain = nn.MultiheadAttention(8, 4, bias=bias)
    layer = QuantMultiheadAttention.from_module(copy.deepcopy(plain), NOTHING, 0, 0)
    query, key, value = torch.randn(3, 5, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    for options in (
        {},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"key_padding_mask": torch.tensor([False, True, False, False, True])},
        {"attn_mask": torch.randn(4, 5, 5)},
    ):
        expected, found = plain(query, key, value, **options), layer(query, key, value, **options)
        torch.testing.assert_close(found[0], expected[0])
        if expected[1] is not None:
            torch.testing.assert_close(found[1], expected[1])
    with pytest.raises(UserError, match=r"is_causal.*attn_mask"):
        layer(query, key, value, is_causal=True)


def test_dropout_of_attention_is_off_in_evaluation():
    plain = nn.MultiheadAttention(8, 2, dropout=0.5)
    layer = QuantMultiheadAttention.from_module(copy.deepcopy(plain), NOTHING, 0, 0)
    query, memory = attention_inputs(False)
    assert not torch.allclose(layer(query, memory, memory)[0], layer(query, memory, memory)[0])
    torch.testing.assert_close(layer.eval()(query, memory, memory)[0], plain.eval()(query, memory, memory)[0])


def test_weights_returned_in_training_are_those_that_were_used():
    plain = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    layer = QuantMultiheadAttention.from_module(copy.deepcopy(plain), NOTHING, 0, 0)
    query, memory = attention_inputs(True)
    found = []
    for attention in (plain, layer):
        torch.manual_seed(0)
        found.append(attention(query, memory, memory, average_attn_weights=False))
    torch.testing.assert_close(found[1], found[0])
    assert 0 < (found[1][1] == 0).float().mean() < 1


BAD_MASKS = {
    "long padding": {"key_padding_mask": torch.zeros(3, 5, dtype=torch.long)},
    "uint8 padding": {"key_padding_mask": torch.zeros(3, 5, dtype=torch.uint8)},
    "padding of another batch": {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)},
    "padding of another length": {"key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)},
    "padding of one sequence": {"key_padding_mask": torch.zeros(5, dtype=torch.bool)},
    "long": {"attn_mask": torch.zeros(5, 5, dtype=torch.long)},
    "complex": {"attn_mask": torch.zeros(5, 5, dtype=torch.complex64)},
    "one row": {"attn_mask": torch.zeros(1, 5)},
    "one column": {"attn_mask": torch.zeros(5, 1)},
    "one number": {"attn_mask": torch.zeros(())},
    "a batch, not heads": {"attn_mask": torch.zeros(3, 5, 5)},
    "four dimensions": {"attn_mask": torch.zeros(3, 2, 5, 5)},
    "float64": {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)},
    "float16 padding": {"key_padding_mask": torch.zeros(3, 5, dtype=torch.float16)},
}


@pytest.mark.parametrize("masks", BAD_MASKS.values(), ids=BAD_MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_that_torch_refuses_are_refused(masks, need_weights):
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.rand(3, 5, 8)
    with pytest.raises((RuntimeError, AssertionError)):
        plain(x, x, x, need_weights=need_weights, **masks)
    with pytest.raises(UserError, match="allowed"):
        quantize(plain)(x, x, x, need_weights=need_weights, **masks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_float32_mask_is_taken_by_another_precision(dtype):
    plain, x = nn.MultiheadAttention(8, 2, batch_first=True).to(dtype), torch.rand(3, 5, 8).to(dtype)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    layer = QuantMultiheadAttention.from_module(copy.deepcopy(plain), NOTHING, 0, 0)
    expected, found = (each(x, x, x, attn_mask=mask, need_weights=False)[0] for each in (plain, layer))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 5, 8), (2, 5, 8), (2, 5, 8)],
        [(3, 5, 8), (3, 5, 8), (3, 4, 8)],
        [(3, 5, 8), (5, 8), (5, 8)],
        [(3, 5, 6), (3, 5, 6), (3, 5, 6)],
        [(2, 3, 5, 8)] * 3,
        [(8,)] * 3,
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_are_refused(shapes):
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    inputs = [torch.rand(shape) for shape in shapes]
    with pytest.raises((RuntimeError, AssertionError)):
        plain(*inputs)
    with pytest.raises(UserError, match="query, key and value"):
        quantize(plain)(*inputs)


def with_quantized_weights(module, names):
    """A copy whose named parameters hold the values of their int4 codes."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name in names:
            parameter = module.get_parameter(name)
            parameter.copy_(values(parameter))
    return module


def test_attention_keeps_its_keys_and_quantizes_its_projections():
    plain = nn.MultiheadAttention(8, 2, batch_first=True)
    layer = quantize(copy.deepcopy(plain), Recipe.of("weights", weight=INT4))
    assert isinstance(layer, QuantMultiheadAttention)
    assert isinstance(layer.out_proj, QuantLinear)
    assert list(layer.state_dict()) == list(plain.state_dict())
    query, _ = attention_inputs(True)
    expected = with_quantized_weights(plain, ["in_proj_weight", "out_proj.weight"])(query, query, query)
    found = layer(query, query, query)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], plain(query, query, query)[0], rtol=1e-3)
    # Activations: the input of the packed projection has int4 codes.
    layer = quantize(copy.deepcopy(plain), Recipe.of("activations", activation=INT4))
    plain.out_proj, layer.out_proj = nn.Identity(), nn.Identity()
    plain.out_proj.weight, plain.out_proj.bias = nn.Parameter(torch.eye(8)), nn.Parameter(torch.zeros(8))
    query_values = values(query)
    torch.testing.assert_close(
        layer(query, query, query)[0], plain(query_values, query_values, query_values)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_runs_quantized_in_evaluation(norm_first):
    # torch has a fused path for evaluation without gradients that would read the weights past the layers.
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    model = quantize(copy.deepcopy(plain), Recipe.of("weights", weight=INT4)).eval()
    weights = [name for name, _ in plain.named_parameters() if "norm" not in name and name.endswith("weight")]
    assert len(weights) == 8
    expected_model = with_quantized_weights(plain, weights).eval()
    plain.eval()
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    for options in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            expected, found, wrong = (each(x, **options) for each in (expected_model, model, plain))
        kept = ~padding if options else torch.ones(3, 5, dtype=torch.bool)
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[kept], wrong[kept], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(model(x, **options)[kept], found[kept], rtol=1e-4, atol=1e-5)


def test_transformer_trains():
    model = quantize(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    grads = train_step(model, torch.randn(3, 5, 8))
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


@pytest.mark.parametrize("options", [{"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_that_cannot_be_quantized_is_refused(options):
    with pytest.raises(UserError, match="skip"):
        quantize(nn.ModuleList([nn.MultiheadAttention(8, 2, **options)]))
