"""The trained model written back: an ordinary folder of transformers, from an engine or from a checkpoint."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file
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
# Besides an export's small files, in a checkpoint: each parameter's name in the export and type, and the buffers.
PARAMETERS, BUFFERS = "parameters.json", "buffers.safetensors"


def export_model(model: PackedModel, output_dir: str, template: ChatTemplate, source_folder: str, ranks: Ranks) -> None:
    """Writes what AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load; generate() stops where
    the template's answers end. An OSError is every rank's. Collective.

    Parameters are gathered one at a time; rank 0 writes shards of at most 5 GB, buffers that a model folder holds among
    them. Everything is written to a temporary folder first; the index, which makes the shards a model, is moved last.
    """
    model.finish_gathering()
    temporary, tensors = Path(output_dir) / ".export", _parameters(model.lm) | _buffers(model.lm)
    ranks.once(lambda: shutil.rmtree(temporary, ignore_errors=True))
    ranks.once(lambda: _write_small_files(model.lm, template, source_folder, temporary))
    for file, names in _shards(tensors).items():
        gathered: dict[str, torch.Tensor] = {}
        for name in names:
            with deepspeed.zero.GatheredParameters([tensors[name]]):  # of a buffer, which is whole: nothing
                if ranks.is_main:
                    gathered[name] = tensors[name].detach().to("cpu", copy=True).contiguous()
        gathered = revert_weight_conversion(model.lm, gathered)  # the names in the folder that rank 0 loaded it from
        ranks.once(lambda: _write_shard(gathered, temporary / file))
    ranks.once(lambda: _move_up(temporary))


def settings_of_exports(lm, template: ChatTemplate, source_folder: str) -> dict[str, bytes]:
    """The files that an export needs besides the parameters' values, which each checkpoint holds. On one rank."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "settings"
        _write_small_files(lm, template, source_folder, folder)
        dtypes = {name: str(param.dtype).removeprefix("torch.") for name, param in _parameters(lm).items()}
        exported = {name: (_name_in_folder(lm, name), dtype) for name, dtype in dtypes.items()}
        (folder / PARAMETERS).write_text(json.dumps(exported), encoding="utf-8")
        buffers = {_name_in_folder(lm, name): buffer.cpu().contiguous() for name, buffer in _buffers(lm).items()}
        _write_shard(buffers, folder / BUFFERS)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def export_parameters(folder: Path, output_dir: Path, shapes: dict[str, list[int]], fill: Callable) -> None:
    """Writes export_model's folder of other parameters, one shard in memory at a time.

    folder: the files of settings_of_exports. fill(name, out) sets a parameter's elements in `out`, one-dimensional.
    Raises UserError where output_dir holds anything.
    """
    parameters = json.loads((folder / PARAMETERS).read_text(encoding="utf-8"))
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    buffers = load_file(folder / BUFFERS)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty; name another folder")
    temporary = output_dir / ".export"
    shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(PARAMETERS, BUFFERS))
    for file in dict.fromkeys(weight_map.values()):
        tensors = {name: buffers[name] for name in buffers if weight_map[name] == file}
        for name, (exported, dtype) in parameters.items():
            if weight_map[exported] == file:
                tensors[exported] = torch.empty(shapes[name], dtype=getattr(torch, dtype))
                fill(name, tensors[exported].view(-1))
        _write_shard(tensors, temporary / file)
    _move_up(temporary)


def _parameters(lm) -> dict[str, torch.Tensor]:
    return dict(lm.named_parameters())


def _buffers(lm) -> dict[str, torch.Tensor]:
    """Those that a model folder holds."""
    saved = lm.state_dict().keys()
    return {name: buffer for name, buffer in lm.named_buffers() if name in saved}


def _name_in_folder(lm, name: str) -> str:
    """The name that a tensor has in the folder that this rank loaded the model from."""
    (found,) = revert_weight_conversion(lm, {name: torch.empty(0)})
    return found


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor or of a whole partitioned parameter."""
    return getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()


def _shards(tensors: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """The names of the tensors in each file."""
    shards: list[list[str]] = [[]]
    for name, tensor in tensors.items():
        if shards[-1] and sum(_size(tensors[other]) for other in shards[-1]) + _size(tensor) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


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
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it its owner's alone, whatever the umask


def _write_small_files(lm, template: ChatTemplate, source_folder: str, folder: Path) -> None:
    """Makes the folder of an export with all but its weights."""
    folder.mkdir()
    lm.config.architectures = [type(lm).__name__]
    with naming(folder):
        _write_settings(lm.config, template, source_folder, folder)
    tensors = _parameters(lm) | _buffers(lm)
    weight_map = {_name_in_folder(lm, name): file for file, names in _shards(tensors).items() for name in names}
    index = {"metadata": {"total_size": sum(map(_size, tensors.values()))}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _move_up(temporary: Path) -> None:
    """Moves a whole export to the folder above. What goes there is the model that its index names; whatever else lies
    there stays."""
    target = temporary.parent
    if (target / INDEX).is_file():
        replaced = json.loads((target / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        for name in [INDEX, *set(replaced)]:
            (target / name).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda p: p.name == INDEX):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, target / path.name)
    temporary.rmdir()
    sync_folder(target)
