"""The DeepSpeed configuration: ds_configs/*.json says how work is placed, the dataclass what is learned."""

import json
from pathlib import Path
from typing import NamedTuple

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import TrainConfig
from common.failures import UserError, as_user_error, one_line

OWNED_BY_FLAGS = {
    "train_batch_size": "--global_batch_size",
    "train_micro_batch_size_per_gpu": "--max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "--global_batch_size",
    "optimizer": "--optimizer and the adam flags",
    "scheduler": "--lr_scheduler_type",
    "gradient_clipping": "--max_grad_norm",
    "bf16": "--dtype",
    "fp16": "--dtype",
    "amp": "--dtype",
    "torch_autocast": "--dtype",
    "data_types": "nothing: gradients are always summed in float32",
    "communication_data_type": "nothing: gradients are always summed in float32",
    "gradient_predivide_factor": "nothing: gradients are exact sums",
    "prescale_gradients": "nothing: gradients are exact sums",
}
# Of zero_optimization: what would change the numbers, lay parts out in another way than checkpoints are written for, or
# choose other leaf modules than the decoder layers (common/zero/engine.py), whose gradients then pass by common/zero/residency.py.
REFUSED = (
    "zero_quantized_",
    "zero_hpz_",
    "mics_",
    "zenflow",
    "cpu_offload",
    "leaf_module",
    "module_granularity_",
    "stage3_module_granularity_",
)
# What the planner decides where the file does not say it: the two keys that are not DeepSpeed's.
RESIDENCY = {"gradients": ("whole", "partitioned"), "parameters": ("resident", "streamed")}
PLACEMENT_KEYS = {
    *RESIDENCY,
    "zero_optimization",
    "aio",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
    "steps_per_print",
    "compile",
}


def deepspeed_config(config: TrainConfig) -> dict:
    """What deepspeed.initialize gets: the file's placement and the values that the flags own.

    One micro-batch a call and no accumulation count: the loop says itself which backward pass is a
    step's last. Raises UserError for a file that cannot be read, sets what a flag owns, has "auto"
    values, is not ZeRO stage 3, or sets what DeepSpeed does not know.
    """

    def wrong(reason: str) -> UserError:
        return UserError(f"--ds_config {config.ds_config}: {reason}")

    path = Path(config.ds_config)
    if not path.is_file() and not path.is_absolute():
        path = Path(__file__).parents[2] / path  # a path of the project's own, from any working directory
    with (
        as_user_error(f"--ds_config {config.ds_config}", OSError),
        as_user_error(f"--ds_config {config.ds_config}: not JSON", ValueError),
    ):
        placement = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(placement, dict) or not isinstance(placement.get("zero_optimization"), dict):
        raise wrong("must be an object with a `zero_optimization` object")
    for key in placement:
        if key in OWNED_BY_FLAGS:
            raise wrong(f"sets `{key}`, which belongs to {OWNED_BY_FLAGS[key]}; remove it")
        if key not in PLACEMENT_KEYS:
            raise wrong(f"unknown key `{key}`; known: {', '.join(sorted(PLACEMENT_KEYS))}")
    if placement["zero_optimization"].get("stage") != 3:
        raise wrong("`zero_optimization.stage` must be 3")
    if refused := [key for key in placement["zero_optimization"] if key.startswith(REFUSED)]:
        raise wrong(f"`zero_optimization.{refused[0]}` is not supported; remove it")
    if auto := _find_auto(placement):
        raise wrong(f'`{auto}` is "auto"; write a value or leave the key out')
    try:
        DeepSpeedZeroConfig(**placement["zero_optimization"])
    except ValueError as e:  # pydantic's
        first = e.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise wrong(f"`{where}`: {one_line(first['msg'])}") from None
    offloads = [key for key in placement["zero_optimization"] if key.startswith("offload_")]
    for key in offloads:
        if (placement["zero_optimization"][key] or {}).get("device") == "nvme":
            raise wrong(
                f"`zero_optimization.{key}.device` nvme is not supported: checkpoints are written from memory; use cpu"
            )
    for key, values in RESIDENCY.items():
        if key in placement and placement[key] not in values:
            raise wrong(f"`{key}` must be {' or '.join(values)}, not {placement[key]!r}")
        if offloads:  # what lives elsewhere cannot be kept whole here
            if placement.get(key) == values[0]:
                raise wrong(f"{key} cannot be {values[0]} with `{offloads[0]}`")
            placement[key] = values[1]
    return {
        "steps_per_print": 2**62,
        **placement,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW: nothing to compile on the user's machine
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the device in every forward pass
    }


class Zero(NamedTuple):
    """What of a ds_config counts for memory: elements that may be gathered ahead of the layer that runs and that are reduced
    in one go; whether masters, moments and gradients, and whether parameters, lie in the host's memory."""

    prefetched: int
    reduced: int
    offloads_optimizer: bool
    offloads_parameters: bool


def zero_of(ds_config: dict) -> Zero:
    zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
    offloads = (
        offload is not None and offload.device != "none" for offload in (zero.offload_optimizer, zero.offload_param)
    )
    return Zero(zero.prefetch_bucket_size, zero.reduce_bucket_size, *offloads)


def _find_auto(value, path: str = "") -> str | None:
    if value == "auto":
        return path
    items = value.items() if isinstance(value, dict) else []
    return next((found for key, item in items if (found := _find_auto(item, f"{path}.{key}".lstrip(".")))), None)
