"""Attention of two layers against torch.nn.MultiheadAttention, also within PyTorch's encoder."""

import copy

import pytest
import torch
from torch import nn

from ensdistill.attention import Attention
from ensdistill.convert import member, to_batch_ensemble, with_attention
from ensdistill.state_dicts import fitted

ROWS, L, S, E, HEADS = 4, 3, 5, 6, 2


def pair(training=False, **options):
    """PyTorch's module, and ours of the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, **options).double().train(training)
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return theirs, Attention(copy.deepcopy(theirs))


def tokens(*lengths):
    return [torch.randn(ROWS, it, E, dtype=torch.float64, requires_grad=True) for it in lengths]


def given(how, length):
    """Queries, keys and values, and which of them are one tensor."""
    if how == "self":
        (x,) = tokens(length)
        return (x, x, x), [x]
    if how == "cross":
        q, k = tokens(L, length)
        return (q, k, k), [q, k]
    q, k, v = tokens(L, length, length)
    return (q, k, v), [q, k, v]


def masks(kind, queries, keys):
    """Masks as PyTorch has them: True, or −∞, hides a key; none hides all."""
    hidden = torch.rand(queries, keys, generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[:, 0] = False
    padding = torch.zeros(ROWS, keys, dtype=torch.bool)
    padding[1, 1:], padding[2, 2:] = True, True
    numbers = torch.randn(queries, keys, dtype=torch.float64)
    each = torch.randn(ROWS * HEADS, queries, keys, dtype=torch.float64)
    hides_each = each > 0.7
    hides_each[..., 0] = False
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": numbers},
        "of each head": {"attn_mask": each},
        "of each head, bool": {"attn_mask": hides_each},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding.double() * -3},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "causal": {
            "attn_mask": torch.ones(queries, keys, dtype=torch.bool).triu(1),
            "is_causal": True,
        },
    }[kind]


MASKS = ["none", "bool", "float", "of each head", "of each head, bool", "padding"]
MASKS += ["float padding", "both", "causal"]


@pytest.mark.parametrize("weights", [False, "mean", "each"])
@pytest.mark.parametrize("how", ["self", "cross", "three"])
@pytest.mark.parametrize("mask", MASKS)
def test_it_computes_what_pytorchs_does(mask, how, weights):
    theirs, ours = pair()
    inputs, wanted = given(how, S)
    asked = {"need_weights": bool(weights), "average_attn_weights": weights == "mean"}
    asked |= masks(mask, inputs[0].shape[1], S)
    expected, found = theirs(*inputs, **asked), ours(*inputs, **asked)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    if weights:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)
        assert found[1].ndim == (3 if weights == "mean" else 4)
    else:
        assert found[1] is None
    same_gradients(theirs, ours, expected[0], found[0], wanted)


def same_gradients(theirs, ours, expected, found, wanted):
    direction = torch.randn_like(expected)
    of_theirs = torch.autograd.grad((expected * direction).sum(), [*wanted, *theirs.parameters()])
    of_ours = torch.autograd.grad((found * direction).sum(), [*wanted, *ours.parameters()])
    for mine, their in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_it_has_the_same_parameters(bias):
    theirs, ours = pair(bias=bias)
    state = ours.state_dict()
    expected = {k.replace("in_proj_", "in_proj."): v for k, v in theirs.state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], it) for key, it in expected.items())
    assert len(state) == (4 if bias else 2)
    x, _ = given("self", S)
    torch.testing.assert_close(ours(*x)[0], theirs(*x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_drops_in_training_alone(weights):
    theirs, ours = pair(training=True, dropout=0.5)
    assert ours.training
    (x, *_), _ = given("self", S)
    drawn = [ours(x, x, x, need_weights=weights)[0] for _ in range(2)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    mean = torch.stack([ours(x, x, x, need_weights=weights)[0] for _ in range(3000)]).mean(0)
    exact = theirs.eval()(x, x, x)[0]
    assert (mean - exact).abs().max() < 0.1 * exact.abs().max()
    assert torch.equal(ours.eval()(x, x, x)[0], ours(x, x, x)[0])
    torch.testing.assert_close(ours(x, x, x)[0], exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nes")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_within_pytorchs_encoder_no_factor_is_passed_over(context, nested, bias, norm_first):
    """In eval mode without gradients PyTorch takes all weights past their layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        E, HEADS, 8, batch_first=True, bias=bias, norm_first=norm_first
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).double().eval()
    ensemble = to_batch_ensemble(encoder, 2)
    x = torch.randn(2 * ROWS, L, E, dtype=torch.float64)
    padding = torch.zeros(2 * ROWS, L, dtype=torch.bool)
    padding[1, 2], padding[6, 1:] = True, True
    with context():
        for hidden in (None, padding):
            found = ensemble(x, src_key_padding_mask=hidden).chunk(2)
            for j, rows in enumerate(x.chunk(2)):
                own = None if hidden is None else hidden.chunk(2)[j]
                expected = explicit(encoder, ensemble, j, bias)(rows, src_key_padding_mask=own)
                seen = torch.ones(ROWS, L, dtype=torch.bool) if own is None else ~own
                torch.testing.assert_close(found[j][seen], expected[seen], rtol=1e-9, atol=1e-10)
        assert (found[0] - found[1]).abs().max() > 1e-3


def explicit(encoder, ensemble, j, bias):
    """The encoder with W∘(s_j r_jᵀ) in the places of its weights."""
    plain, parts = copy.deepcopy(encoder), ensemble.state_dict()
    state = plain.state_dict()
    for key in state:
        place, _, kind = key.replace("in_proj_", "in_proj.").rpartition(".")
        if f"{place}.r" in parts and kind == "weight":
            factors = torch.outer(parts[f"{place}.s"][j], parts[f"{place}.r"][j])
            state[key] = parts[f"{place}.weight"] * factors
        elif f"{place}.r" in parts:
            state[key] = parts[f"{place}.bias"][j]
    plain.load_state_dict(state)
    return plain


def test_members_of_its_layers_are_members():
    _, ours = pair()
    ensemble = to_batch_ensemble(ours, 3)
    (x, *_), _ = given("self", S)
    together = ensemble(*[x.repeat(3, 1, 1)] * 3)[0].chunk(3)
    for j in range(3):
        torch.testing.assert_close(member(ensemble, j)(x, x, x)[0], together[j])


def test_weights_of_a_multihead_attention_are_found_under_their_new_names():
    torch.manual_seed(0)
    given, other = (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
    network = with_attention(other)
    keys = {f"module.{key}": tensor for key, tensor in given.state_dict().items()}
    network.load_state_dict(fitted(keys, network)[0])
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(network.eval()(x), given.eval()(x))
