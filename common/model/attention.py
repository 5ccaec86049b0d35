"""Attention over packed micro-batches: documents never see each other, nor do a pair's two branches.

Each kernel is registered with transformers' AttentionInterface under a name of ours, without an entry for masks, so
that models build none. What a kernel needs to know about the packing travels as keyword arguments through
`model(**kwargs)` to every attention layer. What a kernel does not implement it refuses.
"""

import importlib
from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from common.failures import UserError, one_line
from common.step.packing import STEM, MicroBatch

# What a model's attention may need besides causal attention -> the argument with which its layers ask for it.
WINDOWS, SOFT_CAP, SINKS = "sliding windows", "soft-capped scores", "attention sinks"
ARGUMENTS = {WINDOWS: "sliding_window", SOFT_CAP: "softcap", SINKS: "s_aux"}
# Each kernel, the module that has it, and what it computes of these; the first that will do is taken.
KERNELS = {
    "flash_attention_4": ("flash_attn.cute.interface", (WINDOWS, SOFT_CAP, SINKS)),  # compiled when it first runs
    "flash_attention_2": ("flash_attn.flash_attn_interface", (WINDOWS, SOFT_CAP)),
    "varlen": ("torch.nn.attention.varlen", (WINDOWS, SINKS)),
    "sdpa": ("torch.nn.functional", (WINDOWS, SOFT_CAP, SINKS)),
}
WIDEST_HEAD = 256  # for which variable-length kernels are made; sdpa computes layers of wider ones


def resolve_kernel(name: str, device_type: str, dtype: torch.dtype, needs: Collection[str] = ()) -> str:
    """The kernel behind `--attn_implementation` for a model of those needs; raises UserError where it cannot run."""
    on_gpu = device_type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        return next(kernel for kernel in KERNELS if _why_not(kernel, on_gpu, needs) is None)
    if reason := _why_not(name, on_gpu, needs):
        raise UserError(f"--attn_implementation {name}: {reason}; use auto")
    return name


def _why_not(kernel: str, on_gpu: bool, needs: Collection[str]) -> str | None:
    """What keeps a kernel from running here; None if nothing does."""
    module, computed = KERNELS[kernel]
    if missing := [need for need in needs if need not in computed]:
        return f"does not compute this model's {' and '.join(missing)}"
    if kernel != "sdpa" and not on_gpu:
        return "needs a CUDA device and bfloat16"
    generation = torch.cuda.get_device_capability()[0] if kernel == "flash_attention_4" else None
    if generation not in (None, 9, 10):
        return "needs a Hopper or Blackwell GPU"
    if generation == 10 and needs:  # some it refuses there, and none was seen there
        return f"was seen to compute {' and '.join(needs)} on Hopper GPUs alone"
    try:
        importlib.import_module(module)
    except Exception as e:  # whatever a package raises whose driver or CUDA does not fit
        return f"{module} cannot be imported ({type(e).__name__}: {one_line(e)})"
    return None


def registered_name(kernel: str) -> str:
    """The name under which a model's config selects one of KERNELS. Transformers takes over any name that says "flash",
    and asks of one that says "sdpa" whether the model's class knows its own."""
    return f"plaintune_{kernel.replace('flash_attention_', 'fa').replace('sdpa', 'block_mask')}"


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device; on a GPU through pinned memory, so that the host does not wait for the device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def attention_kwargs(micro_batch: MicroBatch, kernel: str, device: torch.device) -> dict:
    """What the attention layers need to know about one micro-batch, as the model's keyword arguments.

    sdpa: packed_mask bool [1, 1, T, T], True where row i attends to column j; packed_positions int64 [T].
    varlen kernels: packed_cu_seqlens_q, packed_cu_seqlens_k int32 [S], packed_max_seqlen int, packed_key_index int64
    [T_k] or None, of the row's segments, whose last query is aligned with its last key (bottom-right causal). S and
    packed_max_seqlen are rounded up (S by empty segments at the end), so that kernels see few different values. A run
    that shares prompts has an index in every row, because None would be a case of its own to the compiler. For layers
    with heads wider than WIDEST_HEAD: packed_document, packed_branch int [T], and packed_positions as above.
    """
    document, branch = (to_device(array, device) for array in (micro_batch.document, micro_batch.branch))
    positions = to_device(micro_batch.position_ids, device)
    if kernel == "sdpa":
        return {"packed_mask": block_mask(document, branch), "packed_positions": positions}
    queries, keys = zip(*micro_batch.segments, strict=True)
    q_lengths, k_lengths = ([len(positions) for positions in of_segments] for of_segments in (queries, keys))

    def offsets(lengths: list[int]) -> torch.Tensor:
        padding = _power_of_two(len(lengths) + 1, 64) - len(lengths) - 1
        return to_device(np.cumsum([0, *lengths, *[0] * padding], dtype=np.int32), device)

    has_index = micro_batch.shares_prompts or q_lengths != k_lengths
    return {
        **{"packed_document": document, "packed_branch": branch, "packed_positions": positions},
        "packed_cu_seqlens_q": offsets(q_lengths),
        "packed_cu_seqlens_k": offsets(k_lengths),
        "packed_max_seqlen": _power_of_two(max(k_lengths), 512),
        "packed_key_index": to_device(np.concatenate(keys), device) if has_index else None,
    }


def _power_of_two(number: int, least: int) -> int:
    return max(least, 1 << (number - 1).bit_length())


def block_mask(document: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """bool [1, 1, T, T] from int [T]: causal, within a document, and not from one branch into the other."""
    row = torch.arange(len(document), device=document.device)
    causal = row[:, None] >= row[None, :]
    same_document = document[:, None] == document[None, :]
    visible_branch = (branch[None, :] == STEM) | (branch[:, None] == branch[None, :])
    return (causal & same_document & visible_branch)[None, None]


def _taken(module: nn.Module, kernel: str, packing: Tensor | None, dropout: float, kwargs: dict) -> list:
    """[window, softcap, sinks], taken out of a layer's keyword arguments. Raises UserError for arguments that change
    what attention computes and that the kernel does not compute, and where `packing`, what keeps samples apart, has not
    come through the model."""
    taken = {need: kwargs.pop(name, None) for need, name in ARGUMENTS.items()}
    is_causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
    names = [need for need, value in taken.items() if value is not None and need not in KERNELS[kernel][1]]
    names += [name for name in ("position_bias", "indices") if kwargs.get(name) is not None]
    names += ["dropout"] * bool(dropout) + ["attention that is not causal"] * (not is_causal)
    if names:
        raise UserError(f"{type(module).__name__} asks for {names[0]}, which packed attention does not compute")
    if packing is None:
        raise UserError(f"{type(module).__name__} passes no keyword arguments on: samples cannot be kept apart")
    return [*taken.values()]


def _sdpa(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, packed_mask=None, **kwargs):
    """query [1, H, T, D], key and value [1, H_kv, T, D] -> ([1, T, H, D], None); the AttentionInterface signature.

    sliding_window: how many tokens a token sees, itself included. softcap: scores s become softcap tanh(s / softcap).
    s_aux: of each head a score [H] that takes part in the softmax and has no value.
    """
    window, softcap, sinks = _taken(module, "sdpa", packed_mask, dropout, kwargs)
    if window is not None:  # positions are those of a document, and of a branch after its stem
        positions = kwargs["packed_positions"]
        distance = positions[:, None] - positions[None, :]
        packed_mask = packed_mask & (distance < window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # with a mask, torch's fused CPU kernel takes only equal head counts
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None and sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=packed_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~packed_mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), None


def _by_segments(kernel: str, compute: Callable) -> Callable:
    """The AttentionInterface function of a kernel that computes the segments of a row (see attention_kwargs).

    compute(query [T, H, D], key, value [T_k, H_kv, D], offsets_q, offsets_k, most tokens of a segment, scale, keys
    before its own that a token sees or -1 for all, softcap or 0, sinks [H] or None) -> [T, H, D].
    """

    def attend(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
        widths = query.shape[-1], value.shape[-1]
        if max(widths) > WIDEST_HEAD and "packed_document" in kwargs:
            mask = block_mask(kwargs["packed_document"], kwargs["packed_branch"])
            return _sdpa(module, query, key, value, None, scaling, dropout, mask, **kwargs)
        window, softcap, sinks = _taken(module, kernel, kwargs.get("packed_cu_seqlens_q"), dropout, kwargs)
        # Of one width, as kernels ask for; zeros change neither scores nor the rest. Flash-attn-4's gradients of heads
        # of 8 were seen to be wrong: it gets widths that were seen to be right, DeepSeek's 192 and 128 among them.
        padded = [-(-max(widths) // 8) * 8] * 3
        if kernel == "flash_attention_4":
            is_deepseeks = widths == (192, 128) and query.shape[1] == key.shape[1]
            padded = [192, 192, 128] if is_deepseeks else [next(w for w in (64, 128, 256) if w >= max(widths))] * 3
        tensors = [x[0].transpose(0, 1) for x in (query, key, value)]
        tensors = [nn.functional.pad(x, (0, n - x.shape[-1])) for x, n in zip(tensors, padded, strict=True)]
        if (index := kwargs["packed_key_index"]) is not None:
            tensors[1:] = (x[index] for x in tensors[1:])
        scale = widths[0] ** -0.5 if scaling is None else scaling
        packing = (kwargs[f"packed_{name}"] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen"))
        out = compute(*tensors, *packing, scale, -1 if window is None else window - 1, softcap or 0.0, sinks)
        return out[None, ..., : widths[1]], None

    return attend


# ------------------------------------------------------------------ torch's own kernel
def _varlen(query, key, value, offsets_q, offsets_k, length, scale, window, softcap, sinks):
    from torch.nn.attention.varlen import varlen_attn

    if sinks is not None:
        return _VarlenWithSinks.apply(query, key, value, sinks, offsets_q, offsets_k, length, scale, window)
    gqa = {"enable_gqa": True} if _VARLEN_HAS_GQA_FLAG and query.shape[1] != key.shape[1] else {}
    packing = offsets_q, offsets_k, length, length
    return varlen_attn(query, key, value, *packing, scale=scale, window_size=(window, 0), **gqa)


_VARLEN_HAS_GQA_FLAG = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


class _VarlenWithSinks(torch.autograd.Function):
    """Attention in which each head's sink, a score without a value, takes part in the softmax: [T, H, D].

    With a query's log-sum-exp L of its scores s, and L' = log(e^L + e^sink), the output O is that without a sink times
    e^(L - L'). Flash attention's backward pass (Dao 2023, algorithm 2) takes probabilities to be P = e^(s - L') and
    gradients of scores dS = P (dP - sum dO O): with L' and O in place of L and its own output these are those of
    attention with a sink, whose value is nothing, so that its own gradient is -e^(sink - L') sum dO O over the queries.
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, offsets_q, offsets_k, length, scale, window):
        ctx.numbers = length, length, 0.0, window < 0
        ctx.options = {"scale": scale, "window_size_left": window, "window_size_right": 0}
        tensors = query, key, value
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            *tensors, offsets_q, offsets_k, *ctx.numbers, False, **ctx.options
        )
        with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])  # [H, T]
        out = (out * (lse - with_sinks).exp().T[..., None]).to(out.dtype)
        ctx.save_for_backward(sinks, *tensors, out, with_sinks, offsets_q, offsets_k, rng_state, unused)
        return out

    @staticmethod
    def backward(ctx, grad):
        sinks, query, key, value, out, lse, offsets_q, offsets_k, rng_state, unused = ctx.saved_tensors
        saved = grad.contiguous(), query, key, value, out, lse, offsets_q, offsets_k
        grads = torch.ops.aten._flash_attention_backward(*saved, *ctx.numbers, rng_state, unused, **ctx.options)
        taken = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T  # [H, T]
        of_sinks = -((sinks.to(lse.dtype)[:, None] - lse).exp() * taken).sum(1).to(sinks.dtype)
        return *grads, of_sinks, None, None, None, None, None


# ------------------------------------------------------------------ the packages flash-attn and flash-attn-4
def _flash_attention_2(query, key, value, offsets_q, offsets_k, length, scale, window, softcap, sinks):
    from flash_attn import flash_attn_varlen_func

    options = {"softmax_scale": scale, "causal": True, "window_size": (window, 0), "softcap": softcap}
    return flash_attn_varlen_func(query, key, value, offsets_q, offsets_k, length, length, **options)


def _flash_attention_4(query, key, value, offsets_q, offsets_k, length, scale, window, softcap, sinks):
    return _fa4_forward(query, key, value, sinks, offsets_q, offsets_k, length, scale, window, softcap)[0]


def _fa4_options(sinks, offsets_q, offsets_k, length, scale, window, softcap) -> dict:
    options = {"cu_seqlens_q": offsets_q, "cu_seqlens_k": offsets_k, "max_seqlen_q": length, "max_seqlen_k": length}
    windows = {"causal": True} if window < 0 else {"window_size_left": window, "window_size_right": 0}
    return options | windows | {"softmax_scale": scale, "softcap": softcap, "learnable_sink": sinks}


# One operator to torch.compile, which cannot look into the package's kernels.
@torch.library.custom_op("plaintune::fa4", mutates_args=())
def _fa4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    length: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """compute of _by_segments -> (output [T, H, D], float32 log-sum-exp [H, T], a sink's score among them)."""
    from flash_attn.cute.interface import _flash_attn_fwd

    options = _fa4_options(sinks, offsets_q, offsets_k, length, scale, window, softcap)
    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **options)
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("plaintune::fa4_backward", mutates_args=())
def _fa4_backward(
    grad: Tensor,
    tensors: list[Tensor],
    lse: Tensor,
    sinks: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    length: int,
    scale: float,
    window: int,
    softcap: float,
) -> list[Tensor]:
    """Gradients of query, key and value, and of the sinks if there are any. tensors: these three and the output."""
    from flash_attn.cute.interface import _flash_attn_bwd

    options = _fa4_options(sinks, offsets_q, offsets_k, length, scale, window, softcap)
    return [g.contiguous() for g in _flash_attn_bwd(*tensors, grad, lse, **options)][: 3 if sinks is None else 4]


@_fa4_forward.register_fake
def _(q, k, v, *packing):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_fa4_backward.register_fake
def _(grad, tensors, lse, sinks, *packing):
    return [x.new_empty(x.shape) for x in (*tensors[:3], sinks) if x is not None]


def _fa4_save(ctx, inputs, output):
    q, k, v, sinks, offsets_q, offsets_k, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, offsets_q, offsets_k)


def _fa4_gradient(ctx, grad, _):
    *tensors, lse, sinks, offsets_q, offsets_k = ctx.saved_tensors
    grads = _fa4_backward(grad.contiguous(), tensors, lse, sinks, offsets_q, offsets_k, *ctx.numbers)
    return *grads, *[None] * (10 - len(grads))


_fa4_forward.register_autograd(_fa4_gradient, setup_context=_fa4_save)

_OF_SEGMENTS = {"flash_attention_4": _flash_attention_4, "flash_attention_2": _flash_attention_2, "varlen": _varlen}
for _kernel in KERNELS:
    _function = _by_segments(_kernel, _OF_SEGMENTS[_kernel]) if _kernel in _OF_SEGMENTS else _sdpa
    AttentionInterface.register(registered_name(_kernel), _function)
