"""ds_configs/*.json may say how work is placed and nothing else: pytest tests/test_placement.py"""

import json

import launch
import pytest

from common.config import SFTConfig
from common.failures import UserError
from common.zero.ds_config import OWNED_BY_FLAGS, deepspeed_config


@pytest.fixture
def ds_config(tmp_path):
    def write(content) -> SFTConfig:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return SFTConfig(ds_config=str(path))

    return write


@pytest.mark.parametrize("path", sorted((launch.REPO / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_file_is_accepted_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config(SFTConfig(ds_config=f"ds_configs/{path.name}"))["zero_optimization"]["stage"] == 3


def test_sums_are_in_float32_and_the_flags_values_get_through(ds_config):
    config = ds_config({"zero_optimization": {"stage": 3, "overlap_comm": False}})
    config.max_grad_norm = 0.25
    made = deepspeed_config(config)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["communication_data_type"] == "fp32"
    assert made["gradient_clipping"] == 0.25 and made["gradient_accumulation_steps"] == 1
    assert made["bf16"] == {"enabled": True} and made["zero_optimization"]["overlap_comm"] is False
    config.dtype = "float32"
    assert deepspeed_config(config)["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    "key",
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
        "scheduler",
        "gradient_clipping",
        "bf16",
        "fp16",
        "communication_data_type",
        "data_types",
    ],
)
def test_a_value_that_a_flag_owns_is_refused(ds_config, key):
    with pytest.raises(UserError, match=f"sets `{key}`") as error:
        deepspeed_config(ds_config({"zero_optimization": {"stage": 3}, key: 1}))
    assert OWNED_BY_FLAGS[key] in str(error.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3}, "zero_optimisation": {}}, "unknown key `zero_optimisation`"),
        ({"zero_optimization": {"stage": 2}}, "must be 3"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "`zero_optimization.zero_quantized_gradients`",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "`zero_optimization.zero_hpz_partition_size`",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, "`zero_optimization.mics_shard_size`"),
        ({"zero_optimization": {"stage": 3, "cpu_offload": True}}, "`zero_optimization.cpu_offload`"),
        (
            {"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["LlamaModel"]}}},
            "`zero_optimization.leaf_module`",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 3000}},
            "`zero_optimization.stage3_module_granularity_threshold` is not supported",
        ),
        (
            {"zero_optimization": {"stage": 3, "module_granularity_threshold": 3000}},
            "`zero_optimization.module_granularity_threshold` is not supported",
        ),
        ({"zero_optimization": {"stage": 3, "nope": 1}}, "`zero_optimization.nope`: Extra inputs are not permitted"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "x"}}, "`zero_optimization.reduce_bucket_size`:"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "gpu"}}},
            "`zero_optimization.offload_optimizer.device`: Input should be",
        ),
        ({"zero_optimization": {"stage": 3, "compute_grad_norm": False}}, "compute_grad_norm=false"),
        ({"zero_optimization": {}}, "must be 3"),
        ({}, "zero_optimization"),
        ([], "zero_optimization"),
        ({"zero_optimization": 3}, "zero_optimization"),
        ("{", "not JSON"),
        ({"zero_optimization": {"stage": 3}, "gradients": "here"}, "`gradients` must be whole or partitioned"),
        ({"zero_optimization": {"stage": 3}, "parameters": 1}, "`parameters` must be resident or streamed"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/tmp"}}},
            "`zero_optimization.offload_param.device` nvme is not supported",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, "gradients": "whole"},
            "gradients cannot be whole with `offload_optimizer`",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(ds_config, content, named):
    config = ds_config(content)
    with pytest.raises(UserError) as error:
        deepspeed_config(config)
    assert named in str(error.value) and config.ds_config in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
def test_what_is_offloaded_is_not_kept_whole(ds_config, key):
    made = deepspeed_config(ds_config({"zero_optimization": {"stage": 3, key: {"device": "cpu"}}}))
    assert (made["gradients"], made["parameters"]) == ("partitioned", "streamed")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no\.json"):
        deepspeed_config(SFTConfig(ds_config=str(tmp_path / "no.json")))
