"""The trained model written back: an ordinary folder of transformers."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import save_file
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from common.data.chat_template import ChatTemplate
from common.failures import UserError, as_user_error
from common.files import naming, sync_folder
from common.model.load import SAMPLES, generation_config, load_config, load_tokenizer
from common.model.packed import PackedModel
from common.ranks import Ranks

SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"


def export_model(model: PackedModel, output_dir: str, template: ChatTemplate, source_folder: str, ranks: Ranks) -> None:
    """Writes what AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load; generate() stops where
    the template's answers end. An OSError is every rank's. Collective.

    Parameters are gathered one at a time; rank 0 writes shards of at most 5 GB, buffers that a model folder holds among
    them. Everything is written to a temporary folder first; the index, which makes the shards a model, is moved last.
    """
    model.finish_gathering()
    temporary, saved = Path(output_dir) / ".export", model.lm.state_dict().keys()
    tensors = dict(model.lm.named_parameters())
    tensors |= {name: buffer for name, buffer in model.lm.named_buffers() if name in saved}
    sizes = {name: getattr(t, "ds_numel", t.numel()) * t.element_size() for name, t in tensors.items()}  # bytes
    shards: list[list[str]] = [[]]  # names
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    ranks.once(lambda: shutil.rmtree(temporary, ignore_errors=True))
    ranks.once(temporary.mkdir)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        gathered: dict[str, torch.Tensor] = {}
        for name in names:
            with deepspeed.zero.GatheredParameters([tensors[name]]):  # of a buffer, which is whole: nothing
                if ranks.is_main:
                    gathered[name] = tensors[name].detach().to("cpu", copy=True).contiguous()
        gathered = revert_weight_conversion(model.lm, gathered)  # the names in the folder that rank 0 loaded it from
        path = temporary / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(gathered, path.name)
        ranks.once(lambda: _write_shard(gathered, path))
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    ranks.once(lambda: _finish_export(model.lm, template, source_folder, temporary, index))


def rehearse_export(config: PretrainedConfig, template: ChatTemplate, source_folder: str) -> None:
    """Writes all that an export holds but the weights to a temporary folder, and reads it back: what fails then would
    have failed after the last step. Raises UserError."""
    what = f"model {source_folder}: its settings and tokenizer cannot be written and read back"
    with tempfile.TemporaryDirectory() as folder, as_user_error(what):
        _write_settings(config, template, source_folder, Path(folder))
        try:
            load_config(folder)
            tokenizer = load_tokenizer(folder)
        except UserError as error:
            raise ValueError(str(error)) from error
        for text in SAMPLES:
            before, after = template.tokenizer.tokenize(text), tokenizer.tokenize(text)
            if before != after:
                raise ValueError(f"{text!r} becomes {after}, not {before}")


def _write_settings(config: PretrainedConfig, template: ChatTemplate, source_folder: str, folder: Path) -> None:
    config = type(config).from_dict(config.to_dict())
    config.save_pretrained(folder)
    generation_config(source_folder, config, template.end_ids()).save_pretrained(folder)
    template.tokenizer.chat_template = template.jinja
    template.tokenizer.save_pretrained(folder)


def _write_shard(tensors: dict, path: Path) -> None:
    with naming(path):
        save_file(tensors, path, {"format": "pt"})


def _finish_export(lm, template: ChatTemplate, source_folder: str, temporary: Path, index: dict) -> None:
    """Writes all but the weights, and moves everything to the folder above. What goes there is the model that its index
    names; whatever else lies there stays."""
    target, lm.config.architectures = temporary.parent, [type(lm).__name__]
    _write_settings(lm.config, template, source_folder, temporary)
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
