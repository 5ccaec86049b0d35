"""A step's first micro-batch keeps activations in the memory of gradient sums, which its backward pass needs later.

While the first forward pass of a step runs, the optimizer's state is still on its way to and from host memory, and each
layer waits for its weights. The more tokens that pass has, the more of this it hides. What its layers keep is copied
into sums that are not yet in use: the backward pass goes from the last layer to the first and needs a layer's sums only
when it is there, so layer j may keep what it likes in the sums of the layers before it. One layer is left between, so
that sums are zeroed beside its backward pass and not before their own.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

LEAST_BYTES = 2**20  # of a tensor that is worth a copy
ALIGNED_BYTES = 256
LAYERS_BETWEEN = 2  # a layer keeps activations in the sums of layers that come so many before it, and earlier


class Opening:
    """Copies what the layers keep for the backward pass into memory that is lent to them, as long as there is some.

    layers: of the model, in order. lend(i): the memory of layer i's sums that is free until its backward pass, on the
    current stream. is_open: whether the next forward pass is a step's first.
    """

    def __init__(self, policy: nn.Module, layers: nn.ModuleList, lend: Callable[[int], torch.Tensor]):
        self.lend, self.is_open, self.is_in_forward = lend, False, False
        self.room: list[torch.Tensor] = []  # uint8
        self.kept_bytes = 0  # in such memory, of the last such forward pass
        self.left_alone = {param.untyped_storage().data_ptr() for param in policy.parameters()}  # storages
        policy.register_forward_pre_hook(lambda *_: self._begin())
        policy.register_forward_hook(lambda *_: self._end(), always_call=True)
        for i, layer in enumerate(layers):
            hooks = saved_tensors_hooks(self._keep, lambda kept: kept)
            layer.register_forward_pre_hook(lambda layer, _, i=i, hooks=hooks: self._enter(layer, i, hooks))
            layer.register_forward_hook(lambda layer, *_, hooks=hooks: self._leave(layer, hooks), always_call=True)

    def _begin(self) -> None:
        if self.is_open and torch.is_grad_enabled():
            self.is_in_forward, self.kept_bytes = True, 0

    def _end(self) -> None:
        self.is_in_forward, self.room = False, []

    def _enter(self, layer: nn.Module, i: int, hooks: saved_tensors_hooks) -> None:
        """Before layer i runs; one that recomputes keeps nothing."""
        if self.is_in_forward and i >= LAYERS_BETWEEN:
            self.room.append(self.lend(i - LAYERS_BETWEEN).view(torch.uint8))
        if self.is_in_forward and not layer.gradient_checkpointing:
            hooks.__enter__()

    def _leave(self, layer: nn.Module, hooks: saved_tensors_hooks) -> None:
        if self.is_in_forward and not layer.gradient_checkpointing:
            hooks.__exit__()

    @torch.no_grad()
    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that the backward pass will read -> what holds the same then."""
        num_bytes = tensor.numel() * tensor.itemsize
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        if (
            num_bytes < LEAST_BYTES
            or last + 1 != tensor.numel()
            or tensor.untyped_storage().data_ptr() in self.left_alone
        ):
            return tensor.detach()
        needed = -(-num_bytes // ALIGNED_BYTES) * ALIGNED_BYTES
        for i, memory in enumerate(self.room):
            if len(memory) >= needed:
                self.room[i] = memory[needed:]
                self.kept_bytes += needed
                kept = memory[:num_bytes].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
                return kept.copy_(tensor)
        return tensor.detach()
