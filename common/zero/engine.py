"""The DeepSpeed engine: AdamW over ZeRO-3 partitions, driven by the scripts' loops."""

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules

from common.config import TrainConfig
from common.failures import TrainingStopped, as_user_error, is_out_of_memory
from common.model.experts import require_router_logits
from common.model.packed import PackedModel
from common.ranks import Ranks
from common.zero import residency
from common.zero.host_state import HostMemory


def build_engine(model: PackedModel, config: TrainConfig, ds_config: dict, host: HostMemory | None = None):
    """deepspeed.initialize with torch's fused AdamW over every parameter, weight decay on all of them.

    ds_config's `residency` says what stays whole during a step (common/zero/residency.py), its `optimizer_state` which
    share of master weights and moments lies on the device; the rest lies in `host`, None for memory taken now. Raises
    UserError for what DeepSpeed itself refuses.
    """
    require_router_logits(config.router_aux_loss_coef, model.lm)
    betas, eps, decay = (config.adam_beta1, config.adam_beta2), config.adam_epsilon, config.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, betas, eps, decay, fused=True)
    # One gather and one reduction a layer, in place of one for every module in it.
    set_z3_leaf_modules(model, list({type(layer) for layer in model.decoder_layers()}))
    refusals = AssertionError, NotImplementedError, ValueError
    with (
        residency.own_state(ds_config.get("optimizer_state", 1.0), host),
        as_user_error(f"--ds_config {config.ds_config}: DeepSpeed refuses it", *refusals),
    ):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    stays_whole = ds_config.get("residency", "nothing")
    engine.updater = residency.Update(engine, model, stays_whole != "nothing", stays_whole == "all")
    if stays_whole == "all":  # first: its wholes replace shards before sums take memory
        residency.ResidentParameters(engine, model, engine.updater)
    engine.whole_gradients = None
    if stays_whole != "nothing":
        engine.whole_gradients = residency.WholeGradients(engine, model, engine.updater)
    return engine


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
    if not all(ranks.gather(lambda: residency.weights_are_finite(engine))):
        raise TrainingStopped(
            f"step {step}: there are weights that are not finite, after an update whose gradient was; they are not "
            f"written. Try a lower --learning_rate or --weight_decay; if a checkpoint was written, it stands"
        )


@contextmanager
def oom_explained(when: str, budget: int, longest: int):
    """Turns running out of memory into a TrainingStopped that says when, on what, and which flag to change.

    Gives an object whose `tokens` the loop sets to those of the micro-batch in hand; 0 where there is none, as in an
    update. longest: tokens of the longest sample (pair), the least that a micro-batch can be.
    """
    size = SimpleNamespace(tokens=0)
    try:
        yield size
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        what, advice = "", "more devices, or a --ds_config that offloads"
        if size.tokens:
            what = f" on a micro-batch of {size.tokens:,} tokens"
            smaller = max(longest, min(budget, size.tokens) // 2)
            flags = [f"--max_tokens_per_micro_batch {smaller}"] if smaller < size.tokens else []
            flags += ["--gradient_checkpointing full"] if torch.is_grad_enabled() else []
            advice = ", ".join([*flags, "a lower --max_seq_length, or more devices"])
        raise TrainingStopped(f"{when}: out of memory{what}. Try {advice}") from e
