"""The DeepSpeed engine: AdamW over ZeRO-3 partitions, driven by the scripts' loops."""

import deepspeed
import torch

from common.config import TrainConfig
from common.errors import UserError
from common.model import PackedModel
from common.packing import MicroBatch
from common.attention import attention_kwargs


def micro_batch_budget(config: TrainConfig, longest: int, device: torch.device) -> int:
    """Tokens that one micro-batch may hold, at least `longest`, the longest sample's (pair's).

    Raises UserError if a given budget is smaller.
    """
    if config.max_tokens_per_micro_batch == "auto":
        return max(longest, 16384 if device.type == "cuda" else 4096)
    if longest > config.max_tokens_per_micro_batch:
        raise UserError(f"--max_tokens_per_micro_batch {config.max_tokens_per_micro_batch} is less than the longest "
                        f"sample's {longest} tokens; give at least {longest}, or lower --max_seq_length")
    return config.max_tokens_per_micro_batch


def num_checkpointed_layers(config: TrainConfig, num_layers: int, device: torch.device) -> int:
    """Layers whose activations are recomputed; auto = all of them on a GPU, none on a CPU."""
    value = config.gradient_checkpointing
    if value == "auto":
        value = "full" if device.type == "cuda" else "none"
    return {"none": 0, "full": num_layers}.get(value, value if isinstance(value, int) else 0)


def build_engine(model: PackedModel, config: TrainConfig, ds_config: dict):
    """deepspeed.initialize with torch's fused AdamW over every parameter, weight decay on all of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, eps=config.adam_epsilon,
                                  betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay,
                                  fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine


def set_learning_rate(engine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def model_inputs(micro_batch: MicroBatch, kernel: str, device: torch.device) -> dict:
    """A micro-batch as PackedModel's arguments, on the device."""
    def put(array) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)
    return {"input_ids": put(micro_batch.input_ids)[None], "position_ids": put(micro_batch.position_ids)[None],
            "target_rows": put(micro_batch.target_rows), "target_ids": put(micro_batch.target_ids),
            **attention_kwargs(micro_batch, kernel, device)}
