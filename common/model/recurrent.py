"""Layers that carry a state from token to token (linear attention, state spaces, short convolutions) on packed rows.

transformers computes them on a whole row, in plain torch or by the kernels that it finds installed. Here their own
forward pass runs on each segment of a row (see attention.segments) by itself: exact, and slower than a packed kernel.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig

STATEFUL_TYPES = {"linear_attention", "conv", "hybrid"}  # of layers, in a config
Segments = list[tuple[int, slice | torch.Tensor]]  # of each segment: how many queries it ends in, its keys in the row


def is_stateful(config: PretrainedConfig) -> bool:
    """Whether a text decoder's config names layers that carry a state."""
    return bool(STATEFUL_TYPES & {*(getattr(config, "layer_types", None) or [])})


def stateful_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules that mix tokens otherwise than by attention: by a convolution, or (MiniMax) by a sum that decays."""
    return [
        module
        for module in decoder.modules()
        if hasattr(module, "slope_rate") or any(type(child) is nn.Conv1d for child in module.children())
    ]


def by_segment(forward: Callable, segments: Callable[[], Segments]) -> Callable:
    """`forward` run on each of segments() by itself, in place of the row; on all of it if there are none.

    Every tensor [1, T, ...] among the arguments is cut to a segment's keys; results, [1, keys, ...], to its queries.
    """

    @torch.compiler.disable
    def run(*inputs, **named):
        if not (of_row := segments()):
            return forward(*inputs, **named)
        length, parts = sum(num_queries for num_queries, _ in of_row), []
        for num_queries, keys in of_row:

            def cut(x, keys=keys):
                is_row = isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[1] == length
                return x[:, keys] if is_row else x

            some, others = tree_map(cut, (inputs, named))
            parts.append(tree_map(lambda y, n=num_queries: y[:, -n:], forward(*some, **others)))
        return tree_map(lambda *of_segments: torch.cat(of_segments, 1), *parts)

    return run
