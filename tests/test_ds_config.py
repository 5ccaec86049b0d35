"""ds_configs/*.json may say how work is placed and nothing else: pytest tests/test_ds_config.py"""

import json

import launch
import pytest

from common.config import SFTConfig
from common.failures import UserError
from common.zero.ds_config import deepspeed_config


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


def zero3(**keys) -> dict:
    return {"zero_optimization": {"stage": 3, **keys}}


OWNED_BY_FLAGS = "train_batch_size gradient_accumulation_steps train_micro_batch_size_per_gpu optimizer scheduler"
OWNED_BY_FLAGS += " gradient_clipping bf16 fp16 amp torch_autocast data_types communication_data_type"
OWNED_BY_FLAGS += " gradient_predivide_factor prescale_gradients"
OFFLOADED = zero3(offload_param={"device": "cpu"})
REFUSED = [
    *((zero3() | {key: 1}, (f"`{key}`", "the flags'")) for key in OWNED_BY_FLAGS.split()),
    (zero3(reduce_bucket_size="auto"), ('"auto"',)),
    (zero3() | {"zero_optimisation": {}}, ("`zero_optimisation`",)),
    ({"zero_optimization": {"stage": 2}}, ("stage", "3")),
    *((content, ("zero_optimization",)) for content in ({"zero_optimization": {}}, {}, [], {"zero_optimization": 3})),
    ("{", ("not JSON",)),
    pytest.param('{"a": ' * 200_000, ("not JSON",), id="deep"),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', ("`stage` comes twice",)),
    (zero3(zero_quantized_gradients=True), ("zero_quantized_gradients",)),
    (zero3(zero_hpz_partition_size=2), ("zero_hpz_partition_size",)),
    (zero3(mics_shard_size=1), ("mics_shard_size",)),
    (zero3(zenflow={}), ("zenflow",)),
    (zero3(cpu_offload=True), ("cpu_offload",)),
    (zero3(leaf_module={"classes": ["LlamaModel"]}), ("leaf_module",)),
    (zero3(module_granularity_threshold=3000), ("module_granularity_threshold",)),
    (zero3(stage3_module_granularity_threshold=3000), ("stage3_module_granularity_threshold",)),
    (zero3(nope=1), ("nope",)),  # what follows here is DeepSpeed's own refusal
    (zero3(reduce_bucket_size="x"), ("reduce_bucket_size",)),
    (zero3(offload_optimizer={"device": "gpu"}), ("offload_optimizer.device",)),
    (zero3(compute_grad_norm=False), ("compute_grad_norm",)),
    (zero3(offload_param={"device": "nvme", "nvme_path": "/tmp"}), ("nvme",)),
    *((zero3() | {"residency": value}, ("`residency`", "all")) for value in ("whole", 1, None, ["all"])),
    *((OFFLOADED | {"residency": value}, ("`residency`", "offload_param")) for value in ("gradients", "all")),
    *((zero3() | {"optimizer_state": x}, ("`optimizer_state`",)) for x in ("cpu", -0.1, 1.5, True, None, [0.5])),
]


@pytest.mark.parametrize(("content", "named"), REFUSED, ids=str)
def test_a_file_that_cannot_be_used_is_refused_by_name(ds_config, content, named):
    config = ds_config(content)
    with pytest.raises(UserError) as error:
        deepspeed_config(config)
    assert all(name in str(error.value) for name in (*named, config.ds_config)) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_never_ends_is_refused(tmp_path, endless_file):
    for file in (str(tmp_path / "no.json"), endless_file):
        with pytest.raises(UserError, match=file):
            deepspeed_config(SFTConfig(ds_config=file))


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("zero", "given", "residency", "share"),
    [
        ({}, {}, None, None),  # both left open
        ({}, {"residency": "gradients"}, "gradients", None),
        ({"offload_param": CPU}, {}, "nothing", None),
        ({"offload_optimizer": CPU}, {"residency": "all"}, "all", 0.0),
        ({"offload_optimizer": CPU | {"pin_memory": True}}, {}, None, 0.0),
        ({"offload_optimizer": {"device": "none"}}, {}, None, None),
        ({}, {"optimizer_state": "device"}, None, 1.0),
        ({}, {"optimizer_state": "host"}, None, 0.0),
        ({}, {"optimizer_state": 0.25}, None, 0.25),
    ],
)
def test_what_is_offloaded_does_not_stay_whole_and_deepspeed_never_updates_on_the_cpu(
    ds_config, zero, given, residency, share
):
    made = deepspeed_config(ds_config(zero3(**zero) | given))
    assert (made.get("residency"), made.get("optimizer_state")) == (residency, share)
    assert "offload_optimizer" not in made["zero_optimization"]
