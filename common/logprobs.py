"""The one log-probability head: SFT, DPO and the reference pass all read log p(target) from here."""

import torch
from torch import nn

CHUNK_ELEMENTS = 2**27  # float32 logits that exist at once: 512 MiB


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(h W^T + b)[target], row by row, without ever holding more than a chunk of logits.

    With z = h W^T + b, p = softmax(z) and g the incoming gradient of one row's log-probability:
    dz = g (onehot(target) - p), dh = dz W, dW = sum over rows of dz^T h, db = sum over rows of dz.
    The backward pass computes z again. Logits are computed in the weight's dtype, as transformers
    does, and reduced in float32; dW is summed in float32 over the chunks.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk_rows):
        logps = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for i in range(0, len(hidden), chunk_rows):
            rows = slice(i, i + chunk_rows)
            logits = nn.functional.linear(hidden[rows], weight, bias).float()
            logps[rows] = logits.gather(1, targets[rows, None])[:, 0] - logits.logsumexp(dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk_rows = chunk_rows
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for i in range(0, len(hidden), ctx.chunk_rows):
            rows = slice(i, i + ctx.chunk_rows)
            logits = nn.functional.linear(hidden[rows], weight, bias).float()
            grad_logits = torch.softmax(logits, dim=1).mul_(-grad_logps[rows, None])
            grad_logits.scatter_add_(1, targets[rows, None], grad_logps[rows, None])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[rows]
        return (grad_hidden, grad_weight.to(weight.dtype),
                None if grad_bias is None else grad_bias.to(bias.dtype), None, None)


class LogProbHead(nn.Module):
    """Stands in a causal LM for its output projection, with the same parameters under the same names.

    forward(hidden [N, hidden_size], targets int64 [N]) -> float32 [N], log p(target | hidden).
    forward(hidden [..., hidden_size]) -> logits [..., vocab_size], what the replaced projection gave.
    """

    def __init__(self, projection: nn.Linear):
        super().__init__()
        self.weight = projection.weight
        self.register_parameter("bias", projection.bias)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        chunk_rows = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        return _ChunkedLogProbs.apply(hidden, self.weight, self.bias, targets, chunk_rows)


def sequence_logps(logps: torch.Tensor, sequence_targets: list[int]) -> torch.Tensor:
    """float32 [S]: the sum of each sequence's log-probabilities; logps [N] holds sequence after sequence."""
    if not sequence_targets:
        return logps  # nothing to sum, but still what the backward pass of an empty micro-batch starts from
    return torch.stack([part.sum() for part in logps.split(sequence_targets)])
