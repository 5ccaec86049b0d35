"""A causal LM under ZeRO-3: found, checked, partitioned as it loads, run on packed rows, written back whole."""

import json
import re
from itertools import chain
from pathlib import Path

import deepspeed
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.conversion_mapping import extract_weight_conversions_for_model
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from common.config import DPOConfig
from common.failures import UserError, as_user_error
from common.model.attention import registered_name
from common.model.packed import PackedModel
from common.ranks import Ranks

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]
LOAD_GROUP_ELEMENTS = 250_000_000  # parameters that are whole on a device at once while the model loads


def find_model(name_or_path: str, revision: str | None = None) -> str:
    """The local folder of a model, downloaded from the hub if it is not a folder here. Raises UserError."""
    folder = find_folder("model", name_or_path, revision, MODEL_FILES)
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"model {name_or_path}: the folder has no config.json")
    return folder


def find_tokenizer(name_or_path: str) -> str:
    """As find_model, of a tokenizer."""
    return find_folder("tokenizer", name_or_path, None, TOKENIZER_FILES)


def find_folder(what: str, name_or_path: str, revision: str | None, files: list[str]) -> str:
    folder = Path(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"--model_revision {revision}: {name_or_path} is a folder here, which has no revisions; leave it out"
            )
        return str(folder)
    if folder.exists() or name_or_path.startswith((".", "/")) or name_or_path.count("/") > 1:
        raise UserError(f"{what} {name_or_path}: there is no such folder")
    if name_or_path == DPOConfig.model_name_or_path:
        raise UserError(f"{what} {name_or_path}: there is no such folder: run train_sft.py first, or name a model")
    with as_user_error(
        f"{what} {name_or_path}: no such folder here, and the hub did not give it", HfHubHTTPError, OSError, ValueError
    ):
        return snapshot_download(name_or_path, revision=revision, allow_patterns=files)


def load_tokenizer(folder: str):
    """The fast tokenizer of a folder. Raises UserError if there is none or it has no end-of-sequence token."""
    with as_user_error(f"tokenizer {folder}: cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {folder}: needs a tokenizer.json (a fast tokenizer)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {folder}: has no EOS token, so answers could not end; set eos_token")
    return tokenizer


def num_token_ids(tokenizer) -> int:
    """The tokenizer's largest id + 1, which is more than len(tokenizer) where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def load_config(folder: str) -> PretrainedConfig:
    """The model's config. Raises UserError for one that cannot be read, or whose generation_config.json cannot be."""
    with as_user_error(f"model {folder}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder)
    generation_config(folder, config, [])  # now, not when the model is written
    return config


def generation_config(folder: str, config: PretrainedConfig, end_ids: list[int]) -> GenerationConfig:
    """The model's, with end_ids as further ends. Raises UserError."""
    with as_user_error(f"model {folder}: generation_config.json cannot be used; mend or delete it"):
        if (Path(folder) / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder)
        else:
            generation = GenerationConfig.from_model_config(config)
        stop = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        ids = sorted({*end_ids, *(int(t) for t in stop if t is not None)})
    generation.eos_token_id = ids[0] if len(ids) == 1 else ids or None
    return generation


def check_supported(config: PretrainedConfig, max_seq_length: int, longest: int, vocab_needed: int) -> None:
    """Refuses by name what packed training would compute wrongly (INTERFACE: "Only what the code handles is trained").

    longest: tokens of the longest sample; vocab_needed: the tokenizer's largest id + 1.
    Raises UserError.
    """

    def refuse(reason: str) -> None:
        raise UserError(
            f"model type {config.model_type} {reason}: only dense decoders with full causal attention are trained"
        )

    values = config.to_dict()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        refuse("is not a causal language model of transformers")
    if config.get_text_config() is not config:
        refuse("has parts besides its text decoder")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    if getattr(model_class, "_is_stateful", False):
        refuse("keeps state across samples")
    if not getattr(model_class, "_supports_attention_backend", False):
        refuse("does not route its attention through AttentionInterface")
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        refuse(f"has layers of type {', '.join(sorted(unknown))}")
    window = getattr(config, "sliding_window", None)
    has_window = "sliding_attention" in layer_types or not getattr(config, "layer_types", None)
    if window and has_window and getattr(config, "use_sliding_window", True) and window < max_seq_length:
        refuse(f"has a sliding window of {window} tokens, shorter than --max_seq_length {max_seq_length}")
    if getattr(config, "attention_chunk_size", None):
        refuse(f"has attention chunks of {config.attention_chunk_size} tokens")
    parts = [part.items() for name, part in values.items() if name.endswith("_config") and isinstance(part, dict)]
    for name, value in chain(values.items(), *parts):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "softcap" in name and value:
            refuse(f"caps logits softly ({name} = {value})")
        if is_number and value != 1 and ("logit" in name and "scal" in name or "lm_head_multiplier" in name):
            refuse(f"scales its logits ({name} = {value})")
        if is_number and value > 0 and "expert" in name:
            refuse(f"has experts ({name} = {value})")
        if is_number and value > 0 and "drop" in name and "classifier" not in name and "summary" not in name:
            refuse(f"has dropout ({name} = {value})")
    if values.get("alibi") or values.get("position_embedding_type") == "alibi":
        refuse("has ALiBi position biases")
    if values.get("quantization_config"):
        refuse("has quantized weights")
    rope = values.get("rope_parameters") or {}
    rope_types = {p.get("rope_type") for p in (rope, *rope.values()) if isinstance(p, dict)}
    original = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
    if rope_types & {"dynamic", "longrope"} and longest > original:
        refuse(f"changes its RoPE with the longest sequence above {original} tokens")
    if not rope and getattr(config, "max_position_embeddings", longest) < longest:
        refuse(
            f"has {config.max_position_embeddings} positions, the longest sample {longest} tokens; lower --max_seq_length"
        )
    if config.vocab_size < vocab_needed:
        raise UserError(
            f"the tokenizer has {vocab_needed} tokens, the model's embedding only {config.vocab_size} rows; "
            f"use the model's own tokenizer"
        )


def parameter_counts(config: PretrainedConfig) -> tuple[int, int]:
    """Elements of all parameters and of one layer's, of the model that this config describes; tied ones count once."""
    with as_user_error("config.json describes no model that transformers can build"):
        with torch.device("meta"):
            model = PackedModel(AutoModelForCausalLM.from_config(config))
        model.lm.tie_weights()
        layers = model.decoder_layers()
        of_layer = sum(p.numel() for layer in layers for p in layer.parameters()) // len(layers)
    return sum(p.numel() for p in model.parameters()), of_layer


def check_same_vocabulary(policy: PretrainedConfig, reference: PretrainedConfig) -> None:
    """Raises UserError for a reference whose token ids cannot mean the policy's."""
    if policy.vocab_size != reference.vocab_size:
        raise UserError(
            f"--ref_model_name_or_path has a vocabulary of {reference.vocab_size} tokens, the policy one of "
            f"{policy.vocab_size}; log-probabilities of the same tokens cannot be compared"
        )


class WeightReader:
    """The safetensors of a model folder by tensor name; raises UserError for what is missing or torn.

    renamings: transformers' own of names that a folder may have and the model's class has not.
    """

    def __init__(self, folder: str, renamings: list[WeightRenaming] = ()):
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            with as_user_error(f"{index}: not a safetensors index", ValueError, KeyError, TypeError):
                file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                if not all(isinstance(name, str) for name in file_of.values()):
                    raise ValueError("a file's name is no text")
        elif (self.folder / "model.safetensors").is_file():
            with self._open("model.safetensors") as file:
                file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise UserError(f"model {folder}: has neither model.safetensors nor model.safetensors.index.json")
        # Name in the model -> file, name in it.
        self.places = {rename_source_key(key, renamings, [])[0]: (file, key) for key, file in file_of.items()}

    def _open(self, name: str):
        with as_user_error(f"{self.folder / name}: not a whole safetensors file", OSError, SafetensorError):
            return safe_open(self.folder / name, framework="pt")

    def check(self, model: nn.Module) -> None:
        """Raises UserError if a parameter of `model` (whose weights are tied) is missing, has another shape or is no
        floating-point number, or if the folder holds what the model has no place for."""
        slices = {}  # place -> its header's entry
        for file_name in sorted({file for file, _ in self.places.values()}):
            with self._open(file_name) as file:
                slices |= {(file_name, key): file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        self._check_leftovers(model)
        for name, param in model.named_parameters():
            stored = slices.get(self._place(name, model.base_model_prefix))
            if stored is None:
                raise UserError(f"model {self.folder}: the weights lack {name}")
            shape, dtype = stored.get_shape(), stored.get_dtype()
            if shape != list(param.shape):
                raise UserError(f"model {self.folder}: {name} is {shape}, config.json asks for {list(param.shape)}")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise UserError(f"model {self.folder}: {name} is stored as {dtype}; quantized weights are not trained")

    def _check_leftovers(self, model: nn.Module) -> None:
        """What a class says it leaves out may be there, and buffers; and copies of what is tied, if they are copies."""
        prefix, first_of = model.base_model_prefix, {}
        ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), r"inv_freq$", "masked_bias$"]
        known = {name for name, _ in model.named_buffers()}
        for name, param in model.named_parameters(remove_duplicate=False):
            known.add(name)
            first = first_of.setdefault(id(param), name)
            both = [self._place(n, prefix) for n in (first, name)]
            if (
                None not in both
                and both[0] != both[1]
                and not torch.equal(self.read(first, prefix), self.read(name, prefix))
            ):
                raise UserError(
                    f"model {self.folder}: config.json ties {name} to {first}, but the weights differ; set "
                    f"tie_word_embeddings to false, or leave one of them out"
                )
        left = [
            name
            for name in self.places
            if not {name, f"{prefix}.{name}"} & known and not any(re.search(pattern, name) for pattern in ignored)
        ]
        if left:
            raise UserError(
                f"model {self.folder}: the weights hold {len(left)} tensors for which the model of config.json has no "
                f"place ({', '.join(sorted(left)[:3])}{' ...' * (len(left) > 3)}): they would be lost"
            )

    def _place(self, name: str, prefix: str) -> tuple[str, str] | None:
        candidates = (name, name.removeprefix(prefix + "."))  # a checkpoint of the bare decoder has no prefix
        return next((self.places[key] for key in candidates if key in self.places), None)

    def read(self, name: str, prefix: str) -> torch.Tensor:
        file_name, key = self._place(name, prefix)
        with self._open(file_name) as file:
            return file.get_tensor(key)

    def has(self, name: str, prefix: str) -> bool:
        return self._place(name, prefix) is not None


def load_partitioned(
    folder: str, config: PretrainedConfig, dtype: torch.dtype, kernel: str, ds_config: dict, ranks: Ranks
) -> "PackedModel":
    """The model of `folder` with its parameters in `dtype`, partitioned over the ranks as they are read.

    It is built without storage, so no rank ever holds the model whole; rank 0 reads each tensor and
    DeepSpeed hands out the parts. Buffers that no folder holds (RoPE's frequencies) keep the dtype they are defined in.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=registered_name(kernel))
    model.tie_weights()
    conversions = extract_weight_conversions_for_model(model) or []
    reader = WeightReader(folder, [c for c in conversions if isinstance(c, WeightRenaming)])
    ranks.once(lambda: reader.check(model))
    _materialize_buffers(model, reader, dtype, ranks)

    places: dict[int, list[tuple[nn.Module, str]]] = {}  # a tied parameter has several
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            places.setdefault(id(param), []).append((module, name))
    group, group_elements = [], 0
    not_finite = []  # on rank 0 alone
    parameters = list(model.named_parameters())
    for i, (name, meta) in enumerate(parameters):
        param = nn.Parameter(torch.empty(meta.shape, dtype=dtype, device=ranks.device))
        if ranks.is_main:
            param.data.copy_(reader.read(name, model.base_model_prefix))
            if not torch.stack(param.data.aminmax()).isfinite().all():  # the smallest of what holds a NaN is NaN
                not_finite.append(name)
        for module, attribute in places[id(meta)]:
            setattr(module, attribute, param)
        group.append(param)
        group_elements += param.numel()
        if group_elements >= LOAD_GROUP_ELEMENTS or i == len(parameters) - 1:
            deepspeed.zero.Init(
                module=nn.ParameterList(group), config_dict_or_path=ds_config, mem_efficient_linear=False
            )
            group, group_elements = [], 0
    ranks.once(lambda: _refuse_not_finite(folder, not_finite, dtype))  # now that no rank waits for a tensor
    return PackedModel(model)


def _refuse_not_finite(folder: str, not_finite: list[str], dtype: torch.dtype) -> None:
    if not_finite:
        raise UserError(
            f"model {folder}: there are weights that, in {str(dtype).removeprefix('torch.')}, are NaN or infinite: in "
            f"{', '.join(not_finite[:3])}{' ...' * (len(not_finite) > 3)}"
        )


def _materialize_buffers(model: nn.Module, reader: WeightReader, dtype: torch.dtype, ranks: Ranks) -> None:
    """Gives buffers storage and the values that from_pretrained gives them: transformers' own initialization, then, of
    those that belong in a model folder, the file's, in `dtype`. Runs while parameters have no storage, so their
    initialization does nothing."""
    in_folder = persistent_buffers(model).keys()
    for prefix, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        for name, buffer in own.items():
            real = torch.empty_like(buffer, device=ranks.device)
            module._buffers[name] = real.fill_(torch.nan) if real.is_floating_point() else real.zero_()
        if own:
            with torch.no_grad():
                model._init_weights(module)
        for name in own:
            key = f"{prefix}.{name}"
            if key in in_folder and reader.has(key, model.base_model_prefix):
                value = reader.read(key, model.base_model_prefix).to(ranks.device)
                module._buffers[name] = value.to(dtype) if value.is_floating_point() else value
            elif not module._buffers[name].is_floating_point() or module._buffers[name].isnan().any():
                raise UserError(f"model type {model.config.model_type}: nothing says what its buffer {key} holds")


def partition_report(parameters: dict[str, nn.Parameter], ranks: Ranks) -> dict:
    """How many elements there are and how many each rank holds, its padding included: the proof of ZeRO-3."""
    return {
        "stage": 3,
        "num_parameters": sum(p.ds_numel for p in parameters.values()),
        "partitioned_parameters_per_rank": ranks.gather(lambda: sum(p.ds_tensor.numel() for p in parameters.values())),
    }


def persistent_buffers(lm: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are part of a model folder, by name: nothing trains them."""
    names = lm.state_dict().keys()
    return {name: buffer for name, buffer in lm.named_buffers() if name in names}
