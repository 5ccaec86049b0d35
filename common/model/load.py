"""A causal LM under ZeRO-3: found, checked, read, and handed out to the ranks as shards."""

import copy
import re
from pathlib import Path
from typing import Any

import deepspeed
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Mxfp4Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from common.data.chat_template import QUESTION, ChatTemplate
from common.failures import UserError, as_user_error, progress
from common.files import weight_files
from common.model.attention import SINKS, SOFT_CAP, WINDOWS, registered_name
from common.model.experts import GROUPED, part_met
from common.model.packed import PackedModel
from common.model.recurrent import STATEFUL_TYPES, is_stateful
from common.ranks import Ranks

TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
MODEL_FILES = [*TOKENIZER_FILES, "README.md", "model*.safetensors"]
LOAD_GROUP_ELEMENTS = 250_000_000  # parameters that are whole on a device at once while the model loads
# Texts that the ways of splitting words differ on.
SAMPLES = (
    "It's 12345 o'clock, I'LL pay $3.50!",
    "  two\n\n \tlines  ",
    "naïve e\u0301té 漢字 🙂",
    "x=[1,2];y_2",
    "<|a|>\n b",
)
KNOWN_TYPES = {"full_attention", "sliding_attention", "moe", "mlp", *STATEFUL_TYPES}  # of layers, in a config
NO_CODE = {"trust_remote_code": False}  # code in a folder never runs, and nobody is asked whether it may
# Pattern of a config's numbers -> the value that changes nothing here, and what another one means.
REFUSED_NUMBERS = {
    r"(?!attn_logit_softcapping|final_logit_softcapping).*soft_?cap": (0, "caps logits softly"),
    r"(?!logit_scale$|logits_scaling$).*(logit.*scal|scal.*logit)": (1, "scales its logits"),
    r".*jitter": (0, "adds noise to its router"),
    r"^(?!.*(classifier|summary)).*drop": (0, "has dropout"),
}


def find_model(name_or_path: str, revision: str | None = None, files: list[str] = MODEL_FILES) -> str:
    """The local folder of a model, downloaded from the hub if it is not a folder here. Raises UserError."""
    if Path(name_or_path).is_dir():
        if revision is not None:
            raise UserError(f"--model_revision {revision}: {name_or_path} is a folder here, which has no revisions")
        return name_or_path
    advice = "`hf auth login` if it is private or gated"
    with as_user_error(f"{name_or_path}: no such folder here, and the hub did not give it ({advice})"):
        return snapshot_download(name_or_path, revision=revision, allow_patterns=files, ignore_patterns="*/*")


def find_tokenizer(name_or_path: str) -> str:
    """As find_model, of a tokenizer."""
    return find_model(name_or_path, files=TOKENIZER_FILES)


def load_tokenizer(folder: str):
    """The fast tokenizer of a folder, which encodes as its tokenizer.json does: where transformers builds another one
    for its class or model type (Llama 2's, Phi 3's), the file is taken as it is. Raises UserError if there is none, or
    if it has no end-of-sequence token."""
    file = Path(folder) / "tokenizer.json"
    with as_user_error(f"tokenizer {folder}: cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        if tokenizer.is_fast and file.is_file():
            both = (tokenizer.backend_tokenizer, Tokenizer.from_file(str(file)))
            built, stored = ([one.encode(text, add_special_tokens=False).ids for text in SAMPLES] for one in both)
            tokenizer = tokenizer if built == stored else PreTrainedTokenizerFast.from_pretrained(folder)
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {folder}: needs a tokenizer.json, and an eos_token, which ends answers")
    return tokenizer


def warnings(template: ChatTemplate, config: PretrainedConfig, longest: int) -> list[str]:
    """What may surprise whoever uses the model; a line each.  longest: tokens of the longest sample."""
    tokenizer, lines, start = template.tokenizer, [], template.apply([QUESTION])
    own, bos, closing = tokenizer.chat_template, tokenizer.bos_token, tokenizer.tokenize(template.closing)
    positions = getattr(text_config(config), "max_position_embeddings", None) or longest
    if own and own != template.jinja:
        lines.append("it differs from the tokenizer's own, and is exported in its place")
    if bos and tokenizer.encode("a")[0] == tokenizer.bos_token_id and not start.startswith(bos):
        lines.append(f"its texts begin with {start[:20]!r}; the tokenizer puts {bos} in front of other texts")
    if closing and not {*tokenizer.convert_tokens_to_ids(closing)} & {*template.end_ids()}:
        lines.append(f"it ends answers with {closing}, ordinary tokens, at which generation does not stop")
    if longest > positions:
        lines.append(f"the longest sample has {longest:,} tokens, the model's max_position_embeddings is {positions:,}")
    return [f"warning: chat template {template.name!r}: {line}" for line in lines]


def load_config(folder: str) -> PretrainedConfig:
    """The model's config. Raises UserError for one that cannot be read, or whose generation_config.json cannot be.
    Of weights in MXFP4 (gpt-oss) nothing is said: they are loaded as what they stand for, and so exported."""
    with as_user_error(f"model {folder}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
            del config.quantization_config
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


def attention_needs(config: PretrainedConfig, longest: int) -> set[str]:
    """What attention over samples of at most `longest` tokens needs besides being causal (see attention.KERNELS)."""
    text = text_config(config)
    types, window = getattr(text, "layer_types", None), getattr(text, "sliding_window", None) or longest
    slides = getattr(text, "use_sliding_window", True) and (not types or "sliding_attention" in types)
    needs = {WINDOWS} if slides and window < longest else set()
    needs |= {SOFT_CAP} if getattr(text, "attn_logit_softcapping", None) else set()
    return needs | ({SINKS} if any("sink" in name for name, _ in built(config).named_parameters()) else set())


def built(config: PretrainedConfig) -> nn.Module:
    """The model that this config describes, its text part alone, without storage. Raises UserError."""
    what = f"model type {config.model_type}: transformers cannot build it, or its text part cannot be told apart"
    with torch.device("meta"), as_user_error(what):
        model = without_other_parts(auto_class(config).from_config(config, **NO_CODE))
    return as_buffers(model, untrained(model))


def untrained(lm: nn.Module) -> list[str]:
    """Names of the parameters that transformers makes without a gradient, as biases of some routers' choice."""
    return [name for name, param in lm.named_parameters() if not param.requires_grad]


def as_buffers(lm: nn.Module, names: list[str]) -> nn.Module:
    """The model with these parameters as buffers, which no training changes: not weight decay either."""
    for module, _, name in (name.rpartition(".") for name in names):
        param = lm.get_submodule(module)._parameters.pop(name)
        lm.get_submodule(module).register_buffer(name, param.detach())
    return lm


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """What of a model's config describes its text decoder: all, unless it has other parts. Raises UserError."""
    with as_user_error(f"model type {config.model_type} has more than one text decoder", ValueError):
        return config.get_text_config()


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' class that makes a language model of a config, or one that has other parts besides."""
    return AutoModelForCausalLM if text_config(config) is config else AutoModelForImageTextToText


def without_other_parts(lm: nn.Module) -> nn.Module:
    """The model without what no text goes through, such as a vision tower; itself, with the names that it had."""
    if lm.config.get_text_config() is lm.config:
        return lm
    decoder = lm.get_decoder()
    kept = {*decoder.modules(), *lm.get_output_embeddings().modules()}
    for module in [module for module in lm.modules() if module not in kept]:
        for name, child in [*module.named_children()]:
            if child not in kept and decoder not in child.modules():
                delattr(module, name)
        for name in [*module._parameters]:
            delattr(module, name)
    return lm


def check_supported(config: PretrainedConfig, longest: int, vocab_needed: int) -> None:
    """Refuses by name what packed training would compute wrongly (INTERFACE: "Only what the code handles is trained").

    longest: tokens of the longest sample; vocab_needed: the largest token id of the data + 1. Raises UserError.
    """
    text, model_class = text_config(config), auto_class(config)._model_mapping.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    is_decoder = model_class is not None and not (config.is_encoder_decoder or text.is_encoder_decoder)
    values = text.to_dict()
    unknown = ", ".join(sorted({*(getattr(text, "layer_types", None) or [])} - KNOWN_TYPES))
    has_state, uses_interface = is_stateful(text), getattr(model_class, "_supports_attention_backend", False)
    chunk, positions = values.get("attention_chunk_size"), getattr(text, "max_position_embeddings", longest)
    rope = values.get("rope_parameters") or {}
    ropes = [p for p in (rope, *rope.values()) if isinstance(p, dict)]  # of all layers, or of the layers of each type
    changing = [p for p in ropes if p.get("rope_type") in ("dynamic", "longrope")]
    is_beyond = not (rope or has_state) and positions < longest
    original = min([p.get("original_max_position_embeddings") or positions for p in changing], default=longest)
    refusals = [
        (not is_decoder, "is not a causal language model of transformers"),
        (getattr(model_class, "_is_stateful", False) and not has_state, "keeps state across samples"),
        (not (has_state or uses_interface), "does not use AttentionInterface"),
        (unknown, f"has layers of type {unknown}"),
        (chunk, f"has attention chunks of {chunk} tokens"),
        *_refused_numbers(values),
        (values.get("alibi") or values.get("position_embedding_type") == "alibi", "has ALiBi position biases"),
        (getattr(config, "quantization_config", None), "has quantized weights (take a copy in bfloat16)"),
        (longest > original, f"changes its RoPE above {original} tokens"),
        (is_beyond, f"has {positions} positions, the longest sample {longest} tokens"),
    ]
    for is_refused, reason in refusals:
        if is_refused:
            raise UserError(f"model type {config.model_type} {reason}: packed training would compute it wrongly")
    if text.vocab_size < vocab_needed:
        sizes = f"token {vocab_needed - 1}, the model's embedding only {text.vocab_size} rows"
        raise UserError(f"the data has {sizes}; use the model's own tokenizer")


def _refused_numbers(values: dict) -> list[tuple[bool, str]]:
    """(True, reason) for each number of a config, and of the parts in it, that REFUSED_NUMBERS names."""
    parts = [values, *(part for name, part in values.items() if name.endswith("_config") and isinstance(part, dict))]
    return [
        (True, f"{meaning} ({name} = {value})")
        for name, value in (item for part in parts for item in part.items())
        for pattern, (harmless, meaning) in REFUSED_NUMBERS.items()
        if re.match(pattern, name) and type(value) in (int, float) and value != harmless
    ]


def compiles_layers(asked: bool | str, device_type: str, config: PretrainedConfig) -> bool:
    """What `--compile_layers` comes to. `auto` leaves layers alone that carry a state, for none was seen on a GPU, and
    those of Gemma 3n, which clamp their weights in the forward pass: compiled, their backward pass is refused."""
    text = text_config(config)
    is_left_alone = is_stateful(text) or getattr(text, "altup_coef_clip", None)
    return asked is True or (asked == "auto" and device_type == "cuda" and not is_left_alone)


def parameter_sizes(config: PretrainedConfig) -> tuple[list[int], int, int]:
    """Elements of each parameter and of one layer's, of the model that this config describes; tied ones count once.
    And how many of all no token meets, on average. Raises UserError for layers that share parameters: of one that is
    reduced with the layer that it is in, the gradients of the others would be lost."""
    with as_user_error(f"model type {config.model_type} cannot be run on packed rows"):
        model = PackedModel(built(config))
        model.lm.tie_weights()
        layers = model.decoder_layers()
        of_layers = [p for layer in layers for p in layer.parameters()]
    if len(of_layers) > len({*of_layers}):
        raise UserError(f"model type {config.model_type} has layers that share parameters, which are not trained")
    unmet = sum(p.numel() * (1 - part_met(model.config, name)) for name, p in model.named_parameters())
    of_layer = sum(p.numel() for p in of_layers) // len(layers)
    return [p.numel() for p in model.parameters()], of_layer, round(unmet)


def check_same_vocabulary(policy: PretrainedConfig, reference: PretrainedConfig) -> None:
    """Raises UserError for a reference whose token ids cannot mean the policy's."""
    ours, theirs = (text_config(config).vocab_size for config in (policy, reference))
    if ours != theirs:
        sizes = f"{theirs} tokens, the policy one of {ours}"
        raise UserError(f"--ref_model_name_or_path has a vocabulary of {sizes}: use a model of the same tokenizer")


def load_partitioned(
    folder: str, config: PretrainedConfig, dtype: torch.dtype, kernel: str, ds_config: dict, ranks: Ranks
) -> PackedModel:
    """The model of `folder` with its parameters in `dtype`, partitioned over the ranks as it is handed out.

    Rank 0 loads it as a plain from_pretrained does, into its host's memory: weights that are stored in `dtype` stay in
    the mapped files until they are copied to the device. The others build it without storage. Buffers are rank 0's.
    Raises UserError for weights that are not those of the config. Collective.
    """
    options = {"dtype": dtype, "attn_implementation": registered_name(kernel), **NO_CODE}
    with torch.device("meta"):
        model = auto_class(config).from_config(config, **options)
    model.tie_weights()
    on_main = []
    ranks.once(lambda: on_main.append(_from_folder(folder, config, options, model)))
    unchanging = untrained(without_other_parts(model))
    model = as_buffers(on_main.pop() if ranks.is_main else model, unchanging)
    _share_buffers(model, ranks)

    group, unfit, parameters = [], [], list(model.named_parameters())
    numel = sum(param.numel() for _, param in parameters)
    with progress("loading", numel, "parameters", ranks.say, ranks.is_main) as advance:
        for i, (name, param) in enumerate(parameters):
            on_device = nn.Parameter(torch.empty(param.shape, dtype=dtype, device=ranks.device))
            if ranks.is_main:
                on_device.data.copy_(param)
                if not torch.stack(on_device.data.aminmax()).isfinite().all():  # NaN is the smallest of what holds one
                    unfit.append(f"{name} is NaN or infinite")
                if param.dtype != dtype:  # which plain transformers trains in it
                    unfit.append(f"{name} is kept in {param.dtype}")
            torch.utils.swap_tensors(param, on_device)  # in every module that uses it; the host's memory is given up
            group.append(param)
            advance(param.numel())
            if sum(p.numel() for p in group) >= LOAD_GROUP_ELEMENTS or i == len(parameters) - 1:
                _partition(group, ds_config, ranks)
                group = []
    if reasons := ranks.once(lambda: unfit[:3]):  # now that no rank waits for a parameter
        raise UserError(f"model {folder} cannot be trained in {dtype}: {', '.join(reasons)}")
    policy = PackedModel(model)
    policy.config._experts_implementation = GROUPED
    if policy.stateful:
        how = "each sample, and each answer with its prompt, by itself"
        ranks.say(f"{len(policy.stateful)} layers carry a state from token to token: they run on {how}")
    return policy


def _partition(group: list[nn.Parameter], ds_config: dict, ranks: Ranks) -> None:
    """DeepSpeed hands out rank 0's parameters as shards of one size. What of a shard is past the parameter's end it
    leaves as that memory happened to be: here it becomes zero, and so are its master weights and moments."""
    deepspeed.zero.Init(module=nn.ParameterList(group), config_dict_or_path=ds_config, mem_efficient_linear=False)
    for param in group:
        shard = param.ds_tensor
        shard[max(0, param.ds_numel - ranks.rank * shard.numel()) :].zero_()


def _from_folder(folder: str, config: PretrainedConfig, options: dict, expected: nn.Module) -> nn.Module:
    """from_pretrained, in the host's memory. Raises UserError where weights are missing, left over, of another shape or
    quantized, or where those that `expected`, the config's own model, ties differ from each other."""
    logging.set_verbosity_error()  # what it only warns of is refused here
    logging.disable_progress_bar()
    # Mismatched shapes are reported as the rest is: the error in place of that names none.
    options = options | {"ignore_mismatched_sizes": True, "output_loading_info": True, "use_safetensors": True}
    with as_user_error(f"model {folder}: its weights cannot be used"):
        file_of = _files_of_tensors(Path(folder))
        if blocks := [name for name in file_of if name.endswith("_blocks")]:  # of MXFP4
            config = copy.deepcopy(config)
            config.quantization_config = {"quant_method": "mxfp4"}
            options["quantization_config"] = Mxfp4Config(dequantize=True)
            file_of |= {name.removesuffix("_blocks"): file_of[name] for name in blocks}
        model, report = auto_class(config).from_pretrained(folder, config=config, **options)
        if blocks:  # else transformers would give them those names again
            model._weight_conversions = None
        if wrong := [f"{what} {sorted(map(str, names))[:3]}" for what, names in report.items() if names]:
            raise ValueError(f"they do not fit config.json: {'; '.join(wrong)}")
        untied = {name for name, _ in model.named_parameters()} - {name for name, _ in expected.named_parameters()}
        if untied:
            raise ValueError(f"config.json ties {', '.join(sorted(untied))} to weights that differ from it")
    # For the export, when the folder may be gone: the file of each tensor, and the tensors of other parts, and of what
    # transformers has no use for, as of DeepSeek-V3's next-token prediction.
    model.file_of, model.others = file_of, {}
    own = without_other_parts(model).state_dict()
    names = {*own} | {stored for name, tensor in own.items() for stored in stored_names(model, name, tensor)}
    left = file_of.keys() - names
    if text_config(config) is config:  # it has no other parts
        unused = model._keys_to_ignore_on_load_unexpected or []
        left = {name for name in left if any(re.search(pattern, name) for pattern in unused)}
    for name in left:
        with safe_open(Path(folder) / file_of[name], framework="pt") as weights:
            model.others[name] = weights.get_tensor(name)
    return model


def stored_names(lm: nn.Module, name: str, tensor: torch.Tensor) -> list[str]:
    """What folders call a model's tensor, or those that they hold in its place (of a layer's experts: one of each)."""
    shape = getattr(tensor, "ds_shape", tensor.shape)
    return [*revert_weight_conversion(lm, {name: torch.empty(shape, device="meta")})]


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Tensor -> its file, of all that from_pretrained reads; by the files' headers alone.

    Raises ValueError for weights that are stored as integers or in 8 bits, which it would convert without a word:
    without their scales they are wrong.
    """
    file_of = {}
    for file in weight_files(folder):
        with safe_open(folder / file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (it is no dict)
                dtype = weights.get_slice(name).get_dtype()
                if name.endswith("weight") and dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{name} is stored as {dtype}; quantized weights are not trained")
                file_of[name] = file
    return file_of


def _share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Puts rank 0's buffers, which no training changes, on every rank's device."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    values = [[buffer.cpu() for buffer in buffers.values()] if ranks.is_main else []]
    torch.distributed.broadcast_object_list(values, 0, device=ranks.device)
    for name, value in zip(buffers, values[0], strict=True):
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, value.to(ranks.device))
