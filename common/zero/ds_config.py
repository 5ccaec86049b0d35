"""The DeepSpeed configuration: ds_configs/*.json says how work is placed, the flags say what is learned."""

import json
from pathlib import Path

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import TrainConfig
from common.failures import UserError, as_user_error, named_file
from common.files import unique_names

# Keys of zero_optimization, by their beginnings after an optional `stage3_`, that would change the numbers, lay out
# shards in another way than checkpoints are written for, or choose other leaf modules than the decoder layers
# (common/zero/engine.py), whose gradients common/zero/residency.py would then miss.
REFUSED = ("zero_quantized_", "zero_hpz_", "mics_", "zenflow", "cpu_offload", "leaf_module", "module_granularity_")
# What stays whole on a rank during a step. Where the file does not say it, common/zero/memory.py chooses.
RESIDENCY = ("nothing", "gradients", "all")
# `residency` and `optimizer_state` (the share of it on the device) are the keys that are not DeepSpeed's.
PLACEMENT_KEYS = {"residency", "optimizer_state", "zero_optimization", "aio", "compile"}
PLACEMENT_KEYS |= {"steps_per_print", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "flops_profiler"}


def deepspeed_config(config: TrainConfig) -> dict:
    """What deepspeed.initialize gets: the file's placement and the values that the flags own.

    `optimizer_state`, where the file has one, becomes a share. An `offload_optimizer` to cpu means the same as "host".

    One micro-batch a call and no accumulation count: the loop says itself which backward pass is a step's last. Raises
    UserError for a file that cannot be read, is not ZeRO stage 3, or sets what a flag owns or DeepSpeed does not know.
    """
    file, path = f"--ds_config {config.ds_config}", Path(config.ds_config)

    def wrong(reason: str) -> UserError:
        return UserError(f"{file}: {reason}")

    if not path.is_file() and not path.is_absolute():
        path = Path(__file__).parents[2] / path  # a path of the project's own, from any working directory
    with as_user_error(file, OSError), as_user_error(f"{file}: not JSON", ValueError, RecursionError):
        text = named_file(path).read_text(encoding="utf-8")
        placement = json.loads(text, object_pairs_hook=unique_names)
    zero = placement.get("zero_optimization") if isinstance(placement, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise wrong("needs a `zero_optimization` object whose `stage` is 3")
    if others := placement.keys() - PLACEMENT_KEYS:
        known = ", ".join(sorted(PLACEMENT_KEYS))
        raise wrong(f"`{min(others)}` is no key of placement; what is learned is the flags'; remove it; known: {known}")
    if refused := [key for key in zero if key.removeprefix("stage3_").startswith(REFUSED)]:
        raise wrong(f"`zero_optimization.{refused[0]}` is not supported; remove it")
    if '"auto"' in text:  # in place of which DeepSpeed takes its own default
        raise wrong('has the value "auto"; write a value or leave the key out')
    with as_user_error(file, ValueError):  # pydantic's names the key
        devices = offload_devices(DeepSpeedZeroConfig(**zero))
    if "nvme" in devices.values():
        raise wrong("offloading to nvme is not supported: checkpoints are written from memory; use cpu")
    if zero.pop("offload_optimizer", None) and "offload_optimizer" in devices:  # DeepSpeed would update on the CPU
        placement.setdefault("optimizer_state", "host")
    if "offload_param" in devices and placement.setdefault("residency", "nothing") != "nothing":
        raise wrong(
            "`residency` must be nothing with offload_param: what lies in host memory cannot stay on the device"
        )
    if placement.get("residency", "nothing") not in RESIDENCY:
        raise wrong(f"`residency` must be {' or '.join(RESIDENCY)}")
    if "optimizer_state" in placement:
        share = placement["optimizer_state"]
        share = {"device": 1.0, "host": 0.0}.get(share, -1) if isinstance(share, str) else share
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise wrong("`optimizer_state` must be device, host, or the share on the device, from 0 to 1")
        placement["optimizer_state"] = float(share)
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


def offload_devices(zero: DeepSpeedZeroConfig) -> dict[str, str]:
    """{"offload_param" or "offload_optimizer": "cpu" or "nvme"} of what does not lie on the ranks' devices."""
    offloads = {"offload_param": zero.offload_param, "offload_optimizer": zero.offload_optimizer}
    return {key: offload.device for key, offload in offloads.items() if offload and offload.device != "none"}
