"""Attention over packed micro-batches: documents never see each other, nor do a pair's two branches.

Each kernel is registered with transformers' AttentionInterface under a name of ours, without an entry for masks, so
that models build none. What a kernel needs to know about the packing travels as keyword arguments through
`model(**kwargs)` to every attention layer. What a kernel does not implement it refuses.
"""

import importlib
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

from common.failures import UserError, one_line
from common.step.packing import STEM, MicroBatch

# What a model's attention may need besides causal attention.
WINDOWS, SOFT_CAP, SINKS = "sliding windows", "soft-capped scores", "attention sinks"
# Each kernel, the module that has it, and what it computes of these; the first that will do is taken.
KERNELS = {
    "flash_attention_4": ("flash_attn.cute.interface", ()),  # the package flash-attn-4: compiled when it first runs
    "flash_attention_2": ("flash_attn.flash_attn_interface", (WINDOWS, SOFT_CAP)),  # the package flash-attn
    "varlen": ("torch.nn.attention.varlen", (WINDOWS,)),
    "sdpa": ("torch.nn.functional", (WINDOWS, SOFT_CAP, SINKS)),
}


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
    if kernel == "flash_attention_4" and torch.cuda.get_device_capability()[0] not in (9, 10):
        return "needs a Hopper or Blackwell GPU"
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
    that shares prompts has an index in every row, because None would be a case of its own to the compiler.
    """
    if kernel == "sdpa":
        mask = block_mask(to_device(micro_batch.document, device), to_device(micro_batch.branch, device))
        return {"packed_mask": mask, "packed_positions": to_device(micro_batch.position_ids, device)}
    queries, keys = zip(*micro_batch.segments, strict=True)
    q_lengths, k_lengths = ([len(positions) for positions in of_segments] for of_segments in (queries, keys))

    def offsets(lengths: list[int]) -> torch.Tensor:
        padding = _power_of_two(len(lengths) + 1, 64) - len(lengths) - 1
        return to_device(np.cumsum([0, *lengths, *[0] * padding], dtype=np.int32), device)

    has_index = micro_batch.shares_prompts or q_lengths != k_lengths
    return {
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


def _refuse_unimplemented(module: torch.nn.Module, dropout: float, packing: torch.Tensor | None, kwargs: dict) -> None:
    """Raises UserError for arguments that change what attention computes and that no packed kernel implements, and
    where `packing`, what keeps samples apart, has not come through the model."""
    is_causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
    names = [name for name in ("softcap", "s_aux", "position_bias", "indices") if kwargs.get(name) is not None]
    names += ["dropout"] * bool(dropout) + ["attention that is not causal"] * (not is_causal)
    if names:
        raise UserError(f"{type(module).__name__} asks for {names[0]}, which packed attention does not compute")
    if packing is None:
        raise UserError(f"{type(module).__name__} passes no keyword arguments on: samples cannot be kept apart")


def _sdpa(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, packed_mask=None, **kwargs):
    """query [1, H, T, D], key and value [1, H_kv, T, D] -> ([1, T, H, D], None); the AttentionInterface signature.

    sliding_window: how many tokens a token sees, itself included. softcap: scores s become softcap tanh(s / softcap).
    s_aux: of each head a score [H] that takes part in the softmax and has no value.
    """
    sliding_window, softcap, s_aux = (kwargs.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    _refuse_unimplemented(module, dropout, packed_mask, kwargs)
    if sliding_window is not None:  # positions are those of a document, and of a branch after its stem
        positions = kwargs["packed_positions"]
        distance = positions[:, None] - positions[None, :]
        packed_mask = packed_mask & (distance < sliding_window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # with a mask, torch's fused CPU kernel takes only equal head counts
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None and s_aux is None:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=packed_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~packed_mask, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.float()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), None


def _segments(module, query, key, value, dropout, kwargs):
    """[1, H, T, D] -> [T, H, D] for the queries, and the same for the keys and values of every segment; then where
    segments begin among queries and among keys, and the most tokens of one (see attention_kwargs)."""
    _refuse_unimplemented(module, dropout, kwargs.get("packed_cu_seqlens_q"), kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if (index := kwargs["packed_key_index"]) is not None:
        key, value = key[index], value[index]
    return query, key, value, kwargs["packed_cu_seqlens_q"], kwargs["packed_cu_seqlens_k"], kwargs["packed_max_seqlen"]


def _last_keys(sliding_window: int | None) -> tuple[int, int]:
    """The keys before and after its own that a token sees, as flash attention counts them; -1: all of them."""
    return (-1 if sliding_window is None else sliding_window - 1), 0


def _varlen(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, **kwargs):
    from torch.nn.attention.varlen import varlen_attn

    *tensors, length = _segments(module, query, key, value, dropout, kwargs)
    gqa = {"enable_gqa": True} if _VARLEN_HAS_GQA_FLAG and query.shape[1] != key.shape[1] else {}
    window = _last_keys(sliding_window)
    return varlen_attn(*tensors, length, length, scale=scaling, window_size=window, **gqa)[None], None


def _flash_attention_2(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    from flash_attn import flash_attn_varlen_func

    options = {"softmax_scale": scaling, "causal": True, "window_size": _last_keys(kwargs.get("sliding_window"))}
    options["softcap"] = kwargs.pop("softcap", None) or 0.0
    *tensors, length = _segments(module, query, key, value, dropout, kwargs)
    return flash_attn_varlen_func(*tensors, length, length, **options)[None], None


def _flash_attention_4(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _fa4_forward(*_segments(module, query, key, value, dropout, kwargs), scale)[0][None], None


def _fa4_packing(offsets_q, offsets_k, max_length, scale) -> dict:
    packing = {"cu_seqlens_q": offsets_q, "cu_seqlens_k": offsets_k}
    return packing | {"max_seqlen_q": max_length, "max_seqlen_k": max_length, "softmax_scale": scale, "causal": True}


# One operator to torch.compile, which cannot look into the package's kernels.
@torch.library.custom_op("plaintune::fa4", mutates_args=())
def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, max_length: int, scale: float
) -> tuple[Tensor, Tensor]:
    """[T, H, D] queries, [T_k, H_kv, D] keys and values -> (output [T, H, D], float32 log-sum-exp [H, T])."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(q, k, v, return_lse=True, **_fa4_packing(offsets_q, offsets_k, max_length, scale))
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("plaintune::fa4_backward", mutates_args=())
def _fa4_backward(
    grad: Tensor, tensors: list[Tensor], lse: Tensor, offsets_q: Tensor, offsets_k: Tensor, length: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. tensors: these three and the output."""
    from flash_attn.cute.interface import _flash_attn_bwd

    grads = _flash_attn_bwd(*tensors, grad, lse, **_fa4_packing(offsets_q, offsets_k, length, scale))
    return tuple(g.contiguous() for g in grads[:3])


@_fa4_forward.register_fake
def _(q, k, v, offsets_q, offsets_k, max_length, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_fa4_backward.register_fake
def _(grad, tensors, lse, offsets_q, offsets_k, length, scale):
    return tuple(x.new_empty(x.shape) for x in tensors[:3])


def _fa4_save(ctx, inputs, output):
    q, k, v, offsets_q, offsets_k, ctx.max_length, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, offsets_q, offsets_k)


def _fa4_gradient(ctx, grad, _):
    *tensors, lse, offsets_q, offsets_k = ctx.saved_tensors
    grads = _fa4_backward(grad.contiguous(), tensors, lse, offsets_q, offsets_k, ctx.max_length, ctx.scale)
    return *grads, None, None, None, None


_fa4_forward.register_autograd(_fa4_gradient, setup_context=_fa4_save)

_VARLEN_HAS_GQA_FLAG = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)

for _kernel, _function in zip(KERNELS, (_flash_attention_4, _flash_attention_2, _varlen, _sdpa), strict=True):
    AttentionInterface.register(registered_name(_kernel), _function)
