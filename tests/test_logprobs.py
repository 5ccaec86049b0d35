"""The log-probability head is log_softmax of the output projection, in value and gradient.

pytest tests/test_logprobs.py
"""

import pytest
import torch
from torch import nn

from common.model import logprobs
from common.model.logprobs import LogProbHead, sequence_logps

HIDDEN, VOCAB = 12, 37


def projection(bias: bool, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCAB, bias=bias)
    nn.init.normal_(linear.weight)
    return linear.to(dtype)


def by_definition(linear: nn.Linear, hidden, targets, weights, scale=1.0, cap=0.0):
    """Values and gradients in float64, all logits at once."""
    weight = linear.weight.detach().double().requires_grad_()
    bias = None if linear.bias is None else linear.bias.detach().double().requires_grad_()
    hidden = hidden.detach().double().requires_grad_()
    logits = scale * nn.functional.linear(hidden, weight, bias)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logps = torch.log_softmax(logits, -1)[torch.arange(len(targets)), targets]
    (logps * weights.double()).sum().backward()
    return logps.detach(), hidden.grad, weight.grad, None if bias is None else bias.grad


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 11, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 0.8), (3.0, 0.8)])
def test_head_is_log_softmax_in_value_and_gradient(monkeypatch, chunk_rows, bias, scale, cap):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk_rows * VOCAB)
    linear = projection(bias)
    hidden = torch.randn(11, HIDDEN, requires_grad=True)
    targets, weights = torch.randint(0, VOCAB, (11,)), torch.randn(11)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    expected = by_definition(linear, hidden, targets, weights, scale, cap)
    head = LogProbHead(linear, scale, cap)
    logps = head(hidden, targets)
    (logps * weights).sum().backward()
    assert logps.dtype == torch.float32
    seen = [logps, hidden.grad, head.weight.grad, *([head.bias.grad] if bias else [])]
    torch.testing.assert_close([x.double() for x in seen], list(expected[: len(seen)]), rtol=2e-6, atol=2e-6)


def test_bfloat16_reduces_in_float32():
    """Against float64 of the same bfloat16 logits: as exact as float32, not as bfloat16."""
    linear, targets = projection(False, torch.bfloat16), torch.randint(0, VOCAB, (9,))
    hidden = torch.randn(9, HIDDEN).bfloat16().requires_grad_()
    logps = LogProbHead(linear)(hidden, targets)
    logits = nn.functional.linear(hidden, linear.weight).double()
    wanted = torch.log_softmax(logits, -1)[torch.arange(9), targets]
    torch.testing.assert_close(logps.double(), wanted, rtol=1e-6, atol=1e-6)
    logps.sum().backward()
    assert linear.weight.grad.dtype == hidden.grad.dtype == torch.bfloat16
    expected = by_definition(linear, hidden, targets, torch.ones(9))
    for seen, wanted in ((hidden.grad, expected[1]), (linear.weight.grad, expected[2])):
        assert (seen.double() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("num_targets", [1, 4, 9, 11])
def test_compiled_arithmetic_is_the_same_and_sees_a_chunk_at_a_time(monkeypatch, num_targets):
    """One chunk, whose logits are kept, and three, the last of which may be a row."""
    monkeypatch.setattr(logprobs, "COMPILED_CHUNK_BYTES", 4 * (4 * VOCAB + 1))
    hidden, targets, weights = torch.randn(11, HIDDEN), torch.randint(0, VOCAB, (11,)), torch.randn(11)
    hidden, targets, weights = hidden[:num_targets], targets[:num_targets], weights[:num_targets]
    results = []
    for compiled in (False, True):
        head, inputs = LogProbHead(projection(True)), hidden.clone().requires_grad_()
        if compiled:
            head.compile_arithmetic()
            assert head.chunk_rows == 4
        logps = head(inputs, targets)
        (logps * weights).sum().backward()
        results.append((logps.detach(), inputs.grad, head.weight.grad, head.bias.grad))
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=2e-6)


def test_gradients_of_a_bfloat16_projection_are_summed_over_chunks_in_float32(monkeypatch):
    """400 chunks of a row, each of which adds some 1 to one row of each gradient: bfloat16 stays at 256."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", VOCAB)
    linear, hidden, targets = projection(True, torch.bfloat16), torch.full((400, HIDDEN), 0.5), torch.zeros(400).long()
    LogProbHead(linear)(hidden.bfloat16(), targets).sum().backward()
    _, _, weight, bias = by_definition(linear, hidden, targets, torch.ones(400))
    for seen, wanted in ((linear.weight.grad, weight), (linear.bias.grad, bias)):
        assert (seen.double() - wanted).norm() <= 0.01 * wanted.norm()


def test_a_compiled_chunk_of_bfloat16_is_indexed_with_32_bits():
    head = LogProbHead(nn.Linear(1, 2**17, bias=False, dtype=torch.bfloat16, device="meta"))
    head.compile_arithmetic()
    assert 2**31 - 2**18 < head.chunk_rows * 2**17 < 2**31


def test_kept_logits_are_used_once(monkeypatch):
    """The backward pass writes over them: a second one would be wrong without a word."""
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    logps = LogProbHead(projection(False))(hidden, torch.zeros(3, dtype=torch.int64))
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.parametrize("bias", [False, True])
def test_no_targets_give_zero_gradients_not_none(bias):
    head = LogProbHead(projection(bias))
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    logps = head(hidden, torch.zeros(0, dtype=torch.int64))
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, HIDDEN)
    assert head.weight.grad.abs().sum() == 0 and (not bias or head.bias.grad.abs().sum() == 0)


def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    rows, linear = [], nn.functional.linear
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 4 * VOCAB)
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: (rows.append(len(x)), linear(x, *rest))[1])
    hidden, targets = torch.randn(30, HIDDEN, requires_grad=True), torch.zeros(30, dtype=torch.int64)
    LogProbHead(projection(False))(hidden, targets).sum().backward()
    assert max(rows) == 4 and sum(rows) == 2 * 30


def test_head_without_targets_is_the_projection_and_keeps_its_names():
    linear = projection(True)
    head, hidden = LogProbHead(linear), torch.randn(2, 3, HIDDEN)
    assert torch.equal(head(hidden), linear(hidden))
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert head.weight is linear.weight


def test_sequence_logps_sums_each_sequence():
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert sequence_logps(logps, [2, 1, 2]).tolist() == [3.0, 4.0, 24.0]
    empty = sequence_logps(logps[:0].requires_grad_(), [])
    assert empty.shape == (0,) and empty.requires_grad, "an empty micro-batch has a backward pass, too"
