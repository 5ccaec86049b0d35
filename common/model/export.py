"""The trained model written back: an ordinary folder of transformers."""

import json
import os
import shutil
from pathlib import Path

import deepspeed
from safetensors.torch import save_file

from common.data.chat_template import ChatTemplate
from common.files import naming, sync_folder
from common.model.load import generation_config
from common.model.packed import PackedModel
from common.ranks import Ranks

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def export_model(model: PackedModel, output_dir: str, template: ChatTemplate, source_folder: str, ranks: Ranks) -> None:
    """Writes what AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load; generate() stops where
    the template's answers end. An OSError is every rank's. Collective.

    Parameters are gathered one at a time; rank 0 writes shards of at most 5 GB, buffers that a model folder holds with
    the last one. Everything is written to a temporary folder first; the index, which makes the shards a model, is moved
    last.
    """
    model.finish_gathering()
    temporary = Path(output_dir) / ".export"
    ranks.once(lambda: _make_empty(temporary))
    saved = model.lm.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.lm.named_buffers() if name in saved}
    shards, size, total_size = [], 0, sum(buffer.nbytes for buffer in buffers.values())
    for name, param in model.lm.named_parameters():
        num_bytes = param.ds_numel * param.element_size()
        if not shards or size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = param
        size += num_bytes
        total_size += num_bytes
    weight_map = {}
    for i, shard in enumerate(shards):
        tensors = {}
        for name, param in shard.items():
            with deepspeed.zero.GatheredParameters([param]):
                if ranks.is_main:
                    tensors[name] = param.detach().to("cpu", copy=True).contiguous()
        if shard is shards[-1]:
            tensors |= {name: buffer.to("cpu", copy=True) for name, buffer in buffers.items()}
        path = temporary / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, path.name)
        ranks.once(lambda: _write_shard(tensors, path))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    ranks.once(lambda: _finish_export(model.lm, template, source_folder, temporary, index))


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write_shard(tensors: dict, path: Path) -> None:
    with naming(path):
        save_file(tensors, path, {"format": "pt"})


def _finish_export(lm, template: ChatTemplate, source_folder: str, temporary: Path, index: dict) -> None:
    """Writes all but the weights, and moves everything to the folder above. What goes there is the model that its index
    names; whatever else lies there stays."""
    config, target = type(lm.config).from_dict(lm.config.to_dict()), temporary.parent
    config.architectures = [type(lm).__name__]
    config.save_pretrained(temporary)
    generation_config(source_folder, config, template.end_ids()).save_pretrained(temporary)
    template.tokenizer.chat_template = template.jinja
    template.tokenizer.save_pretrained(temporary)
    (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if (target / INDEX).is_file():
        replaced = json.loads((target / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        for name in [INDEX, *set(replaced)]:
            (target / name).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda p: p.name == INDEX):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        path.chmod(temporary.stat().st_mode & 0o666)  # safetensors' files are for their owner alone, whatever the umask
        os.replace(path, target / path.name)
    temporary.rmdir()
    sync_folder(target)
