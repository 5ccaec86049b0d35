"""Of a model of images and text the text part is trained, all else is kept: pytest tests/test_images.py"""

import json
from pathlib import Path

import launch
import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import settings_of
from test_packed import Engine

from common.config import SFTConfig
from common.failures import UserError
from common.files import INDEX
from common.model import export, load
from common.model.attention import registered_name
from common.model.experts import GROUPED
from common.model.packed import PackedModel, verify_packed_model
from common.ranks import start
from common.zero.ds_config import deepspeed_config

NAMES = sorted(models.WITH_IMAGES)


def stored(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name -> file and tensor."""
    return {
        name: (file.name, weights.get_tensor(name))
        for file in sorted(folder.glob("*.safetensors"))
        for weights in [safe_open(file, "pt")]
        for name in weights.keys()  # noqa: SIM118  (it is no dict)
    }


def is_of_images(name: str) -> bool:
    return any(part in name for part in ("vis", "projector"))


def make(folder: Path, architecture: str) -> Path:
    """Text in bfloat16, images in float32, some in each of several files; a processor's file."""
    models.make_model(folder, architecture, shard="30KB")
    files, tensors = sorted(folder.glob("*.safetensors")), stored(folder)
    for file in files:
        own = {name: tensor for name, (of, tensor) in tensors.items() if of == file.name}
        save_file({n: t if is_of_images(n) else t.bfloat16() for n, t in own.items()}, file, {"format": "pt"})
    (folder / "preprocessor_config.json").write_text('{"size":  1}')
    assert len(files) > 2 and any(map(is_of_images, tensors))
    return folder


def exported(folders: list[str], outputs: list[str]) -> None:
    """In a rank's process."""
    ranks = start(5)
    for folder, output in zip(folders, outputs, strict=True):
        config, ds_config = load.load_config(folder), deepspeed_config(SFTConfig())
        policy = load.load_partitioned(folder, config, torch.bfloat16, "sdpa", ds_config, ranks)
        ranks.once(lambda output=output: Path(output).mkdir())
        settings = ranks.once(lambda: settings_of(policy.lm, folder))
        export.export_model(policy, output, settings, ranks)


def test_an_untouched_model_comes_back_tensor_by_tensor(tmp_path):
    """Names, files, types and bits of all tensors; config.json and the processor's file, byte for byte. And of a model
    of text alone a tensor that transformers passes over."""
    folders = [make(tmp_path / name, name) for name in NAMES]
    plain = models.make_model(tmp_path / "qwen3_next", "qwen3_next")
    weights = stored(plain) | {"mtp.norm.weight": ("", torch.randn(3).half())}
    save_file({name: tensor for name, (_, tensor) in weights.items()}, plain / "model.safetensors", {"format": "pt"})
    outputs = [folder.with_name(f"{folder.name}-exported") for folder in [*folders, plain]]
    launch.on_ranks(exported, 2, list(map(str, [*folders, plain])), list(map(str, outputs)))
    after = stored(outputs.pop())
    assert after.keys() == weights.keys() and torch.equal(after["mtp.norm.weight"][1], weights["mtp.norm.weight"][1])
    for folder, output in zip(folders, outputs, strict=True):
        before, after = stored(folder), stored(output)
        assert before.keys() == after.keys()
        for name, (file, tensor) in before.items():
            assert after[name][0] == file and after[name][1].dtype == tensor.dtype, name
            assert torch.equal(after[name][1], tensor), name
        for name in ("config.json", "preprocessor_config.json"):
            assert (output / name).read_bytes() == (folder / name).read_bytes()
        maps = [json.loads((path / INDEX).read_text())["weight_map"] for path in (folder, output)]
        assert maps[0] == maps[1]


def engine_of(name: str) -> Engine:
    config = models.make_config(name)
    load.check_supported(config, 100, 300)
    torch.manual_seed(0)
    lm = load.auto_class(config).from_config(config, dtype=torch.float32, attn_implementation=registered_name("sdpa"))
    models.drawn(lm)
    load.text_config(config)._experts_implementation = GROUPED
    return Engine(PackedModel(load.without_other_parts(lm)))


@pytest.mark.parametrize("name", NAMES)
def test_packed_text_is_that_of_the_whole_model_without_images(name):
    engine = engine_of(name)
    assert not any(is_of_images(parameter_name) for parameter_name, _ in engine.module.lm.named_parameters())
    sizes, _, _ = load.parameter_sizes(models.make_config(name))
    assert sum(sizes) == sum(p.numel() for p in engine.module.lm.parameters())
    verify_packed_model(engine, "sdpa", models.OneRank())
    values = engine.module.decoder_layers()[-1].self_attn.v_proj
    values.register_forward_hook(lambda module, inputs, output: output + 0.1 if output.shape[1] > 30 else output)
    with pytest.raises(UserError, match="in one row differ"):
        verify_packed_model(engine, "sdpa", models.OneRank())
