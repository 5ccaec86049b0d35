"""Layers that add their weight's gradient to a float32 sum, in place of autograd's."""

import torch
from torch import nn


# ---------------------------------------------------------------------- gradients
@torch.library.custom_op("plaintune::add_product", mutates_args=("weight_sum",))
def add_product(weight_sum: torch.Tensor, grad: torch.Tensor, inputs: torch.Tensor) -> None:
    """weight_sum float32 [out, in] += grad^T inputs, from [..., out] and [..., in] in one dtype, summed in float32."""
    _add_product(weight_sum, grad.flatten(0, -2), inputs.flatten(0, -2))


def _add_product(weight_sum: torch.Tensor, grad: torch.Tensor, inputs: torch.Tensor) -> None:
    if grad.dtype == torch.float32:
        weight_sum.addmm_(grad.T, inputs)
    elif grad.device.type == "cuda":
        torch.addmm(weight_sum, grad.T, inputs, out_dtype=torch.float32, out=weight_sum)
    else:  # torch has no such product on a CPU
        weight_sum.addmm_(grad.T.float(), inputs.float())


@add_product.register_fake
def _(weight_sum, grad, inputs):
    return None


@torch.library.custom_op("plaintune::add_grouped_product", mutates_args=("weight_sum",))
def add_grouped_product(weight_sum: torch.Tensor, grad: torch.Tensor, inputs: torch.Tensor, ends: torch.Tensor) -> None:
    """add_product for each expert e, from its rows of grad [S, out] and inputs [S, in] to weight_sum[e].

    weight_sum float32 [E, out, in]; ends int32 [E]: where the rows of each expert end, which begin where those of the
    one before do. torch's own grouped product gives bfloat16 alone. The host waits for `ends`.
    """
    start = 0
    for of_expert, end in zip(weight_sum, ends.tolist(), strict=True):
        if end > start:
            _add_product(of_expert, grad[start:end], inputs[start:end])
        start = end


@add_grouped_product.register_fake
def _(weight_sum, grad, inputs, ends):
    return None


# One operator to torch.compile, whose own takes bfloat16 alone.
@torch.library.custom_op("plaintune::grouped_mm", mutates_args=())
def grouped_mm(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """torch's grouped product: [S, m] and [E, m, n] to [S, n]; or, of the rows of each expert, [m, S] and [S, n] to
    [E, m, n]. ends: see add_grouped_product."""
    return nn.functional.grouped_mm(left, right, offs=ends).contiguous()


@grouped_mm.register_fake
def _(left, right, ends):
    if right.ndim == 3:
        return left.new_empty(left.shape[0], right.shape[2])  # len() would make it a constant to the compiler
    return left.new_empty(ends.shape[0], left.shape[0], right.shape[1])


class _GroupedProduct(torch.autograd.Function):
    """grouped_product, whose gradient of the weight goes to weight_sum, if there is one, and not to autograd."""

    @staticmethod
    def forward(ctx, inputs, weight, weight_sum, ends, is_transposed):
        ctx.save_for_backward(inputs, weight, ends)
        ctx.weight_sum, ctx.is_transposed = weight_sum, is_transposed
        return torch.ops.plaintune.grouped_mm(inputs, weight if is_transposed else weight.mT, ends)

    @staticmethod
    def backward(ctx, grad):
        (inputs, weight, ends), grad_weight = ctx.saved_tensors, None
        left, right = (inputs, grad) if ctx.is_transposed else (grad, inputs)
        if not ctx.needs_input_grad[1]:
            pass
        elif ctx.weight_sum is None:
            grad_weight = torch.ops.plaintune.grouped_mm(left.mT, right, ends)
        else:
            torch.ops.plaintune.add_grouped_product(ctx.weight_sum, left, right, ends)
        grad_inputs = torch.ops.plaintune.grouped_mm(grad, weight.mT if ctx.is_transposed else weight, ends)
        return grad_inputs, grad_weight, None, None, None


def grouped_product(
    inputs: torch.Tensor, weight: torch.Tensor, weight_sum: torch.Tensor | None, ends: torch.Tensor, is_transposed: bool
) -> torch.Tensor:
    """[S, out]: inputs [S, in], an expert's rows times its weight^T; weight [E, out, in] ([E, in, out] if transposed).

    ends: see add_grouped_product. The weight's gradient is added to weight_sum, float32 in weight's shape, if there is
    one; else it is autograd's.
    """
    return _GroupedProduct.apply(inputs, weight, weight_sum, ends, is_transposed)


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


def summing_lookup(ids: torch.Tensor, weight: torch.Tensor, weight_sum: torch.Tensor | None) -> torch.Tensor:
    """weight[ids]; the weight's gradient is added to weight_sum float32, if there is one; else it is autograd's."""
    if weight_sum is None:
        return nn.functional.embedding(ids, weight)
    return _SummingLookup.apply(ids, weight, weight_sum, None)


class SummingEmbedding(nn.Embedding):
    """An embedding that adds its weight's gradient to `weight_sum` float32 [num_embeddings, embedding_dim]."""

    weight_sum: torch.Tensor

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return _SummingLookup.apply(ids, self.weight, self.weight_sum, self.padding_idx)
