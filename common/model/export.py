"""The trained model written back: an ordinary folder of transformers, from an engine or from a checkpoint."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from common.data.chat_template import ChatTemplate
from common.failures import UserError, as_user_error, print_line, progress
from common.files import INDEX, naming, sync_folder, weight_files, write_file
from common.model.load import NO_CODE, SAMPLES, built, generation_config, load_config, stored_names, text_config
from common.model.packed import PackedModel
from common.ranks import Ranks

# Besides an export's small files, in a checkpoint: its _layout, and the buffers.
LAYOUT, BUFFERS = "layout.json", "buffers.safetensors"


def export_settings(
    config: PretrainedConfig, dtype: torch.dtype, template: ChatTemplate, source_folder: str
) -> dict[str, bytes]:
    """The small files of an export, read back here: what fails then would have failed after the last step. The run's
    export and those of its checkpoints are of these bytes. On one rank, before the weights load. Raises UserError."""
    print_line("writing the export's small files to a temporary folder, and reading them back")
    what = f"model {source_folder}: its settings and tokenizer cannot be written and read back"
    with tempfile.TemporaryDirectory() as name, as_user_error(what):
        folder = Path(name)
        own = type(config).from_dict(config.to_dict())
        own.architectures, own.dtype = [type(built(config)).__name__], dtype
        generation = generation_config(source_folder, own, template.end_ids())
        if text_config(own) is own:
            own.eos_token_id = generation.eos_token_id
            own.save_pretrained(folder)
        else:  # whatever served the model with its other parts serves this one
            for path in [Path(source_folder) / "config.json", *Path(source_folder).glob("*processor_config.json")]:
                shutil.copyfile(path, folder / path.name)
        generation.save_pretrained(folder)
        template.tokenizer.chat_template = template.jinja
        template.tokenizer.save_pretrained(folder)
        # As whoever serves the model reads them.
        AutoConfig.from_pretrained(folder, **NO_CODE)
        GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        for text in SAMPLES:
            before, after = template.tokenizer.tokenize(text), tokenizer.tokenize(text)
            if before != after:
                raise ValueError(f"{text!r} becomes {after}, not {before}")
        return _files(folder)


def stored_layout(lm) -> dict[str, bytes]:
    """The files that say where an export's tensors go, and the tensors that no training changes. On rank 0, once the
    model is loaded."""
    layout, tensors = _layout(lm), _tensors(lm)
    files = {LAYOUT: json.dumps(layout).encode()}
    if [*layout] != ["model.safetensors"]:
        named = ((file, places or [name]) for file, names in layout.items() for name, (_, places) in names.items())
        weight_map = {stored: file for file, names in named for stored in names}
        sizes = (getattr(t, "ds_numel", t.numel()) * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        files[INDEX] = json.dumps(index, indent=2).encode() + b"\n"
    buffers = {name: t.cpu().contiguous() for name, t in tensors.items() if not isinstance(t, torch.nn.Parameter)}
    return files | {BUFFERS: save(buffers)}


def export_model(model: PackedModel, output_dir: str, settings: dict[str, bytes], ranks: Ranks) -> None:
    """Writes what AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load; generate() stops where
    the template's answers end. settings: of export_settings and stored_layout. An OSError is every rank's. Collective.

    The files and the names in them are those of the folder that the model was loaded from, with the buffers that it
    holds. Parameters are gathered one at a time; rank 0 has one file's in memory. Everything is written to a temporary
    folder first; the index, which makes the files a model, or the only one of them is moved last.
    """
    model.finish_gathering()
    temporary, tensors, layout = Path(output_dir) / ".export", _tensors(model.lm), json.loads(settings[LAYOUT])
    ranks.once(lambda: _begin(temporary, settings))
    with progress("writing the model", len(layout), "files", ranks.say, ranks.is_main) as advance:
        for file, names in layout.items():
            stored: dict[str, torch.Tensor] = {}
            for name, (_, places) in names.items():
                # Of a buffer, which is whole, and of another part's tensor, which rank 0 alone has: nothing.
                with deepspeed.zero.GatheredParameters([tensors[name]] if name in tensors else []):
                    if ranks.is_main:
                        whole = tensors[name].detach().to("cpu", copy=True).contiguous()
                        stored |= _stored(model.lm, name, whole, places)
            ranks.once(partial(_write_shard, stored, temporary / file))
            advance(1)
    ranks.once(lambda: _move_up(temporary))


def export_parameters(folder: Path, output_dir: Path, shapes: dict[str, list[int]], fill: Callable) -> None:
    """Writes export_model's folder of other parameters, one file in memory at a time.

    folder: with those settings' files. fill(name, out) sets a parameter's elements in `out`, one-dimensional.
    Raises UserError where output_dir holds anything but the beginning of this.
    """
    settings = _files(folder)
    layout = json.loads(settings[LAYOUT])
    buffers, lm, temporary = load_file(folder / BUFFERS), built(load_config(str(folder))), output_dir / ".export"
    # What an export that was cut off has left is no model yet, and is written again.
    ours = {temporary.name, *layout, *settings} if temporary.is_dir() else set()
    with as_user_error(f"{output_dir} cannot be a folder", FileExistsError, NotADirectoryError):
        output_dir.mkdir(parents=True, exist_ok=True)
    if {path.name for path in output_dir.iterdir()} - ours:
        raise UserError(f"{output_dir} is not empty; name another folder")
    _begin(temporary, settings)
    for file, names in layout.items():
        stored: dict[str, torch.Tensor] = {}
        for name, (dtype, places) in names.items():
            whole = buffers.get(name)
            if whole is None:
                whole = torch.empty(shapes[name], dtype=getattr(torch, dtype))
                fill(name, whole.view(-1))
            stored |= _stored(lm, name, whole, places)
        _write_shard(stored, temporary / file)
    _move_up(temporary)


def _tensors(lm) -> dict[str, torch.Tensor]:
    """The parameters, tied ones once, the buffers that a model folder holds, and, on rank 0, those of other parts."""
    buffers, saved = dict(lm.named_buffers()), lm.state_dict().keys()
    return dict(lm.named_parameters()) | {n: b for n, b in buffers.items() if n in saved} | getattr(lm, "others", {})


def _stored(lm, name: str, whole: torch.Tensor, places: dict[str, int]) -> dict[str, torch.Tensor]:
    """Those of the tensors that folders hold in place of a parameter (of a layer's experts: one of each expert) which
    `places` has: name in a folder -> place among all of them; {}: it is stored as it is."""
    if not places:
        return {name: whole}
    tensors = [*revert_weight_conversion(lm, {name: whole}).values()]
    return {stored: tensors[i] if len(tensors) == 1 else tensors[i].clone() for stored, i in places.items()}


def _layout(lm) -> dict[str, dict[str, tuple[str, dict[str, int]]]]:
    """File -> a tensor's name -> its type, and the _stored places of what the file holds of it: as in the folder that
    this rank loaded the model from. What that does not hold goes to its last file."""
    layout: dict[str, dict[str, tuple[str, dict[str, int]]]] = {}
    for name, tensor in _tensors(lm).items():
        dtype, converted = str(tensor.dtype).removeprefix("torch."), stored_names(lm, name, tensor)
        as_it_is = name in lm.others or name in lm.file_of and not lm.file_of.keys() & {*converted}
        for i, stored in enumerate([name] if as_it_is else converted):
            file = Path(lm.file_of.get(stored, max(lm.file_of.values()))).name
            file = file if re.fullmatch(r"model.*\.safetensors", file) else f"model-{file}"
            places = layout.setdefault(file, {}).setdefault(name, (dtype, {}))[1]
            places |= {} if as_it_is else {stored: i}
    return layout


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _begin(folder: Path, settings: dict[str, bytes]) -> None:
    """Makes the folder of an export anew, with all but its weights."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()  # not its parents: a run whose folder was deleted or renamed ends here
    for name, data in settings.items():
        if name not in (LAYOUT, BUFFERS):
            write_file(folder / name, [data])


def _write_shard(tensors: dict, path: Path) -> None:
    with naming(path):
        save_file(tensors, path, {"format": "pt"})
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it its owner's alone, whatever the umask


def _move_up(temporary: Path) -> None:
    """Moves a whole export to the folder above, in place of the model there; whatever else lies there stays."""
    target = temporary.parent
    for name in [INDEX, "model.safetensors", *weight_files(target)]:
        (target / name).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda p: p.name in (INDEX, "model.safetensors")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, target / path.name)
    temporary.rmdir()
    sync_folder(target)
