"""Layers that add their weight's gradient to a float32 sum, in place of autograd's."""

import torch
from torch import nn


# ---------------------------------------------------------------------- gradients
@torch.library.custom_op("plaintune::add_product", mutates_args=("weight_sum",))
def add_product(weight_sum: torch.Tensor, grad: torch.Tensor, inputs: torch.Tensor) -> None:
    """weight_sum float32 [out, in] += grad^T inputs, from [..., out] and [..., in] in one dtype, summed in float32."""
    grad, inputs = grad.flatten(0, -2), inputs.flatten(0, -2)
    if grad.dtype == torch.float32:
        weight_sum.addmm_(grad.T, inputs)
    elif grad.device.type == "cuda":
        torch.addmm(weight_sum, grad.T, inputs, out_dtype=torch.float32, out=weight_sum)
    else:  # torch has no such product on a CPU
        weight_sum.addmm_(grad.T.float(), inputs.float())


@add_product.register_fake
def _(weight_sum, grad, inputs):
    return None


class _SummingLinear(torch.autograd.Function):
    """inputs W^T, whose gradient of W goes to weight_sum and not to autograd."""

    @staticmethod
    def forward(ctx, inputs, weight, weight_sum):
        ctx.save_for_backward(inputs, weight)
        ctx.weight_sum = weight_sum  # not saved: a module that is used twice changes it in between
        return nn.functional.linear(inputs, weight)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:  # not while the start-up check asks for the embeddings' gradient alone
            torch.ops.plaintune.add_product(ctx.weight_sum, grad, inputs)
        return grad @ weight, None, None


class SummingLinear(nn.Linear):
    """A linear layer that adds its weight's gradient to `weight_sum` float32 [out_features, in_features]."""

    weight_sum: torch.Tensor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = _SummingLinear.apply(inputs, self.weight, self.weight_sum)
        return outputs if self.bias is None else outputs + self.bias


class _SummingLookup(torch.autograd.Function):
    """Rows of an embedding, whose gradient goes to weight_sum and not to autograd."""

    @staticmethod
    def forward(ctx, ids, weight, weight_sum, padding_idx):
        ctx.save_for_backward(ids)
        ctx.weight_sum, ctx.padding_idx = weight_sum, padding_idx
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        ids, grad = ctx.saved_tensors[0], grad.float()
        if grad.device.type != "cuda":  # what autograd itself does there: adds in the same order every time
            padding = -1 if ctx.padding_idx is None else ctx.padding_idx
            rows = len(ctx.weight_sum)
            ctx.weight_sum.add_(torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False))
            return None, None, None, None
        if ctx.padding_idx is not None:  # nn.Embedding: it gets no gradient
            grad = grad * (ids != ctx.padding_idx)[..., None]
        ctx.weight_sum.index_put_((ids,), grad, accumulate=True)  # sorts, so here too
        return None, None, None, None


class SummingEmbedding(nn.Embedding):
    """An embedding that adds its weight's gradient to `weight_sum` float32 [num_embeddings, embedding_dim]."""

    weight_sum: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _SummingLookup.apply(ids, self.weight, self.weight_sum, self.padding_idx)
