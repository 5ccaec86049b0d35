"""The one log-probability head: SFT, DPO and the reference pass all read log p(target) from here."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from common.model.summing import add_product

CHUNK_ELEMENTS = 2**27  # logits that exist at once: 512 MiB in float32
COMPILED_CHUNK_BYTES = 2**32  # of logits in their own dtype; in bfloat16 just below 2**31 elements, an index of 32 bits


def changed(logits: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    """What a model's output layer makes of its projection's logits, float32: times scale, and, if cap is not 0, within
    cap: cap tanh(z / cap)."""
    logits = logits.float() * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def target_logps(
    logits: torch.Tensor, targets: torch.Tensor, scale: float = 1.0, cap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log softmax(changed(logits))[target], log-sum-exp), float32 [N] each. logits [N, V] in any dtype, targets int64
    [N]."""
    logits = changed(logits, scale, cap)
    lse = logits.logsumexp(dim=1)
    return logits.gather(1, targets[:, None])[:, 0] - lse, lse


def logits_gradient_(
    logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, grad_logps: torch.Tensor, scale=1.0, cap=0.0
) -> None:
    """Replaces logits [N, V] by d target_logps / d logits, times grad_logps float32 [N]: g (onehot - softmax), times
    scale, and the cap's derivative 1 - tanh^2."""
    hit = targets[:, None] == torch.arange(logits.shape[1], device=logits.device)
    used = changed(logits, scale, cap)
    gradient = grad_logps[:, None] * (hit.float() - torch.exp(used - lse[:, None])) * scale
    logits.copy_(gradient * (1 - (used / cap) ** 2) if cap else gradient)


def _compiled(function: Callable) -> Callable:
    """function(logits [N, V], *rest [N]) compiled once for every N but 1, of which torch would make a case of its own.

    It would do so also of a slice that begins at 0, and of a gradient that a sum has expanded: the rest is copied. And
    of an N that first equals V: N is marked, for compile_layers' setting does not reach a GPU's backward thread.
    """
    compiled = torch.compile(function, dynamic=True)

    def run(logits: torch.Tensor, *rest: torch.Tensor):
        if len(logits) == 1:
            return function(logits, *rest)
        arguments = [logits, *(values.clone(memory_format=torch.contiguous_format) for values in rest)]
        for tensor in arguments:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*arguments)

    return run


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(h W^T + b)[target], row by row, without ever holding more than a chunk of logits.

    With z = h W^T + b and g the gradient of the rows' log-probabilities: dz = logits_gradient_(z, targets, lse, g),
    dh = dz W, dW = sum over rows of dz^T h, db = sum over rows of dz. If one chunk holds all rows, z is kept for the
    backward pass, which can then run once; else it is computed again. Logits are computed in the weight's dtype, as
    transformers does, and reduced in float32; dW and db are summed in float32. With weight_sum (see
    common/zero/residency.py) dW is added to it and autograd gets none.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, weight_sum, targets, chunk_rows, logps_of, gradient_of):
        logps, lse = torch.empty(2, len(hidden), dtype=torch.float32, device=hidden.device)
        logits = None
        for i in range(0, len(hidden), chunk_rows):
            rows, logits = slice(i, i + chunk_rows), None  # the last chunk goes before the next one comes
            logits = nn.functional.linear(hidden[rows], weight, bias)
            logps[rows], lse[rows] = logps_of(logits, targets[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, lse, logits if len(hidden) <= chunk_rows else None)
        ctx.weight_sum, ctx.chunk_rows, ctx.gradient_of = weight_sum, chunk_rows, gradient_of
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, bias, targets, lse, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        weight_sum = torch.zeros_like(weight, dtype=torch.float32) if ctx.weight_sum is None else ctx.weight_sum
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for i in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(i, i + ctx.chunk_rows)
            logits = nn.functional.linear(hidden[rows], weight, bias) if kept is None else kept
            ctx.gradient_of(logits, targets[rows], lse[rows], grad_logps[rows])
            grad_hidden[rows] = logits @ weight
            if ctx.needs_input_grad[1]:
                add_product(weight_sum, logits, hidden[rows])
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
            del logits
        grad_weight = weight_sum.to(weight.dtype) if ctx.weight_sum is None else None
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), *[None] * 5


class LogProbHead(nn.Module):
    """Stands in a causal LM for its output projection, with the same parameters under the same names.

    forward(hidden [N, hidden_size], targets int64 [N]) -> float32 [N], log p(target | hidden).
    forward(hidden [..., hidden_size]) -> logits [..., vocab_size], what the replaced projection gave.
    """

    def __init__(self, projection: nn.Linear, scale: float = 1.0, cap: float = 0.0):
        super().__init__()
        self.weight = projection.weight
        self.register_parameter("bias", projection.bias)
        self.weight_sum: torch.Tensor | None = None  # where the weight's gradient goes, in place of autograd
        self.vocab_size = projection.out_features
        self.chunk_rows = max(1, CHUNK_ELEMENTS // self.vocab_size)
        self.logps_of: Callable = partial(target_logps, scale=scale, cap=cap)
        self.gradient_of: Callable = partial(logits_gradient_, scale=scale, cap=cap)

    def compile_arithmetic(self) -> None:
        """Fuses what happens to a chunk's logits: no float32 copy of them is made, so a chunk can be a whole row's."""
        self.logps_of, self.gradient_of = _compiled(self.logps_of), _compiled(self.gradient_of)
        self.chunk_rows = max(1, (COMPILED_CHUNK_BYTES // self.weight.element_size() - 1) // self.vocab_size)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        arithmetic = self.chunk_rows, self.logps_of, self.gradient_of
        return _ChunkedLogProbs.apply(hidden, self.weight, self.bias, self.weight_sum, targets, *arithmetic)


def sequence_logps(logps: torch.Tensor, target_counts: list[int]) -> torch.Tensor:
    """float32 [S]: the sum of each sequence's log-probabilities; logps [N] holds sequence after sequence."""
    if not target_counts:
        return logps  # nothing to sum, but still what the backward pass of an empty micro-batch starts from
    return torch.stack([part.sum() for part in logps.split(target_counts)])
