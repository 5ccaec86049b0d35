"""The DeepSpeed engine: AdamW over ZeRO-3 partitions, driven by the scripts' loops."""

import gc
import resource
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules

from common.config import TrainConfig
from common.failures import TrainingStopped, as_user_error, is_out_of_memory
from common.model.packed import PackedModel
from common.ranks import Ranks
from common.zero.residency import ResidentParameters, WholeGradients


def build_engine(model: PackedModel, config: TrainConfig, ds_config: dict):
    """deepspeed.initialize with torch's fused AdamW over every parameter, weight decay on all of them.

    ds_config's `residency` says what stays whole during a step (common/zero/residency.py). Raises UserError for what
    DeepSpeed itself refuses.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        eps=config.adam_epsilon,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    # One gather and one reduction a layer, in place of one for every module in it.
    set_z3_leaf_modules(model, list({type(layer) for layer in model.decoder_layers()}))
    with as_user_error(
        f"--ds_config {config.ds_config}: DeepSpeed refuses it", AssertionError, NotImplementedError, ValueError
    ):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    zero = engine.optimizer
    if not zero.offload_optimizer:
        zero._get_norm_groups = partial(_gradient_norm, zero)
    is_whole = ds_config.get("residency") in ("gradients", "all")
    zero.unscale_and_clip_grads = partial(_clip, zero, is_whole)
    is_resident = ds_config.get("residency") == "all"
    rounded: set[int] = set()
    if is_whole:
        WholeGradients(engine, model, engine.zero_reduce_bucket_size(), rounded if is_resident else None)
    if is_resident:
        ResidentParameters(engine, model, rounded)
    return engine


def _gradient_norm(zero) -> list[torch.Tensor]:
    """[float64]: the 2-norm of what all ranks hold, -1 if it is not finite. What DeepSpeed's does, in one pass over the
    gradients, which are not copied to float64 first."""
    gradients = [part for group in range(len(zero.fp16_groups)) for part in zero.averaged_gradients[group]]
    square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()
    torch.distributed.all_reduce(square, group=zero.dp_process_group)
    return [torch.where(square.isfinite(), square.sqrt(), -1.0)]


def _clip(zero, is_whole: bool, group: int, norm: torch.Tensor) -> None:
    """Finds zero.clip_factor, max_grad_norm / (norm + 1e-6) if that is below 1, as torch's clip_grad_norm_, and scales
    the group's flat gradients by it; where they are whole the update does that (common/zero/residency.py)."""
    if group == 0:  # the host waits for the norm once, before an update is under way
        zero._global_grad_norm = float(norm)
        zero.clip_factor = min(1.0, zero.clip_grad / (zero._global_grad_norm + 1e-6)) if zero.clip_grad > 0 else 1.0
    if not is_whole and zero.clip_factor < 1:
        zero.fp32_partitioned_groups_flat[group].grad.mul_(zero.clip_factor)


@contextmanager
def inference_engine(model: PackedModel, ds_config: dict):
    """An engine without an optimizer, its memory given back at the end; `model` cannot be used afterwards."""
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    try:
        yield engine
    finally:
        engine.destroy()
        for param in model.parameters():
            param.ds_tensor = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def set_learning_rate(engine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def require_finite_weights(engine, step: int, ranks: Ranks) -> None:
    """Raises TrainingStopped if an update made weights that no model should be written with. Collective."""
    masters = engine.optimizer.fp32_partitioned_groups_flat
    if not all(ranks.gather(lambda: all(bool(flat.isfinite().all()) for flat in masters))):
        raise TrainingStopped(
            f"step {step}: there are weights that are not finite, after an update whose gradient was; they are not "
            f"written. Try a lower --learning_rate or --weight_decay; if a checkpoint was written, it stands"
        )


@contextmanager
def out_of_memory_explained(where: str, budget: int, longest: int):
    """Turns running out of memory into a TrainingStopped that says where, what was tried and which flag to change.

    Gives an object whose `tokens` the loop sets to those of the micro-batch in hand; 0 where there is none, as in an
    update. longest: tokens of the longest sample (pair), the least that a micro-batch can be.
    """
    size = SimpleNamespace(tokens=0)
    try:
        yield size
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        if torch.cuda.is_available():
            used = f"{torch.cuda.memory_allocated() / 1e9:.1f} GB of {torch.cuda.mem_get_info()[1] / 1e9:.1f} GB were allocated"
        else:
            used = (
                f"the process had used up to {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB"
            )
        micro_batch, advice = "", "more devices, or a --ds_config that offloads"
        if size.tokens:
            smaller = max(longest, min(budget, size.tokens) // 2)
            flags = [f"--max_tokens_per_micro_batch {smaller}"] if smaller < size.tokens else []
            flags += ["--gradient_checkpointing full"] if torch.is_grad_enabled() else []
            micro_batch = f" on a micro-batch of {size.tokens:,} tokens (at most {budget:,})"
            advice = ", ".join([*flags, "a lower --max_seq_length, or more devices"])
        stopped = TrainingStopped(f"{where}: out of memory{micro_batch}; {used}. Try {advice}")
        stopped.told_here = True  # the other ranks do not know of it
        raise stopped from e
