"""Layers that carry a state from token to token (linear attention, state spaces, short convolutions) on packed rows.

transformers computes them on a whole row, in plain torch or by the kernels that it finds installed. Here their own
forward pass runs on each segment of a row (see MicroBatch.segments) by itself: exact, and slower than a packed kernel.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from transformers import PretrainedConfig

from common.step.packing import MicroBatch

STATEFUL_TYPES = {"linear_attention", "conv", "hybrid"}  # of layers, in a config


def is_stateful(config: PretrainedConfig) -> bool:
    """Whether a text decoder's config names layers that carry a state."""
    return bool(STATEFUL_TYPES & {*(getattr(config, "layer_types", None) or [])})


def stateful_modules(decoder: nn.Module) -> list[nn.Module]:
    """The modules that mix tokens otherwise than by attention: by a convolution, or (MiniMax) by a sum that decays."""
    return [m for m in decoder.modules() if hasattr(m, "slope_rate") or nn.Conv1d in map(type, m.children())]


def by_segment(forward: Callable, row: Callable[[], MicroBatch | None]) -> Callable:
    """`forward` run on each segment of row() by itself; where that is None, on its arguments as they are.

    Every tensor [1, T, ...] among the arguments is cut to a segment's keys; results, [1, keys, ...], to its queries.
    """

    @torch.compiler.disable
    def run(*inputs, **named):
        if (micro_batch := row()) is None:
            return forward(*inputs, **named)
        of_row = micro_batch.segments
        sizes, order = [len(keys) for _, keys in of_row], np.concatenate([keys for _, keys in of_row])
        length, results = int(of_row[-1][0][-1]) + 1, []

        def cut(x) -> Sequence:
            if not (isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[1] == length):
                return [x] * len(sizes)
            return (x if len(order) == length else x[:, torch.from_numpy(order).to(x.device)]).split(sizes, 1)

        arguments, form = tree_flatten((inputs, named))
        for (queries, _), of_segment in zip(of_row, zip(*map(cut, arguments), strict=True), strict=True):
            some, others = tree_unflatten(of_segment, form)
            results.append(tree_map(lambda y, of=queries: y[:, -len(of) :], forward(*some, **others)))
        return tree_map(lambda *parts: torch.cat(parts, 1), *results)

    return run
