"""Every setting of a run: one flat dataclass per script, one parser, one validation.

The dataclass owns what is learned (model, data, lengths, batch, optimizer, schedule, loss);
ds_configs/*.json owns how it is placed on devices. Values come from the defaults below, then from
`--config FILE.yaml`, then from the command line, each overriding the one before.
"""

import dataclasses
import difflib
import math
import os
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.failures import UserError, as_user_error, print_line


def _field(default, help: str, choices: tuple = (), least: float | None = None, most: float = math.inf):
    """choices: the only values, or, where `least` is given, the only ones besides finite numbers from least to most."""
    metadata = {"help": help, "choices": choices, "least": least, "most": most}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


PATHS = {
    "model_name_or_path",
    "tokenizer_name_or_path",
    "ref_model_name_or_path",
    "dataset_mixer",
    "chat_template",
    "output_dir",
    "resume",
    "cache_dir",
    "ds_config",
}
LR_SCHEDULERS = (
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_restarts",
    "polynomial",
)


@dataclass
class TrainConfig:
    """What SFT and DPO have in common."""

    model_name_or_path: str = _field("meta-llama/Llama-3.1-8B", "hub id or folder of the model to fine-tune")
    model_revision: str | None = _field(None, "branch, tag or commit of the model on the hub")
    tokenizer_name_or_path: str | None = _field(None, "tokenizer, when it is not the model's own")
    dtype: str = _field(
        "bfloat16", "dtype of weights and activations; masters, moments and sums are float32", ("bfloat16", "float32")
    )
    attn_implementation: str = _field(
        "auto",
        "packed attention: flash_attention_4, flash_attention_2, varlen (torch's own, CUDA) or sdpa (a block mask)",
        ("auto", "flash_attention_4", "flash_attention_2", "varlen", "sdpa"),
    )
    dataset_mixer: list[str] = _field([], "one or more SOURCE[@REVISION][:SPLIT][=AMOUNT]")
    max_seq_length: int = _field(4096, "samples keep their first max_seq_length tokens", least=2)
    chat_template: str = _field("tulu", "a built-in name, a .jinja file, or `tokenizer` for the tokenizer's own")
    global_batch_size: int = _field(128, "samples (SFT) or pairs (DPO) per optimizer step, over all ranks", least=1)
    max_tokens_per_micro_batch: int | str = _field(
        "auto", "tokens packed into one forward pass of one rank", ("auto",), least=1
    )
    gradient_checkpointing: int | str = _field(
        "auto", "layers that recompute their activations", ("auto", "none", "full"), least=0
    )
    compile_layers: bool | str = _field(
        "auto", "torch.compile the decoder layers; auto = on a GPU", (True, False, "auto")
    )
    optimizer: str = _field("adamw", "the optimizer", ("adamw",))
    learning_rate: float = _field(5e-6, "peak learning rate", least=0)
    lr_scheduler_type: str = _field("linear", "schedule, by transformers' names", LR_SCHEDULERS)
    warmup_ratio: float = _field(0.03, "part of all steps that warms up", least=0, most=1)
    weight_decay: float = _field(0.0, "AdamW's decoupled weight decay, on every parameter", least=0)
    adam_beta1: float = _field(0.9, "AdamW's beta1", least=0)
    adam_beta2: float = _field(0.999, "AdamW's beta2", least=0)
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon", least=0)
    max_grad_norm: float = _field(1.0, "gradients are scaled down to this global norm; 0 = never", least=0)
    num_train_epochs: int = _field(2, "passes over the data", least=1, most=10**9)
    max_train_steps: int | None = _field(
        None, "optimizer steps in all, in place of num_train_epochs", least=1, most=10**9
    )
    stop_after_steps: int | None = _field(
        None, "stop and export after this many steps of the schedule that the other flags make", least=1
    )
    seed: int = _field(42, "decides the order of the samples", least=0, most=2**63 - 1)
    output_dir: str = _field("output/sft", "model, metrics and checkpoints go here")
    checkpointing_steps: int | str = _field(
        500, "a checkpoint every so many steps, or every epoch", ("epoch",), least=1
    )
    keep_last_n_checkpoints: int = _field(3, "older checkpoints are deleted", least=1)
    clean_checkpoints_at_end: bool = _field(False, "delete this run's checkpoints once the model is exported")
    resume: str = _field("auto", "auto, never (start over), or a checkpoint's path")
    cache_dir: str = _field("~/.cache/plaintune", "token and reference caches")
    collective_timeout_minutes: int = _field(
        30, "a rank that waits longer for the others gives up", least=1, most=10**6
    )
    logging_steps: int = _field(1, "write metrics every so many steps", least=1)
    ds_config: str = _field("ds_configs/zero3.json", "how ZeRO-3 places the work")


@dataclass
class SFTConfig(TrainConfig):
    """train_sft.py: no flags = Llama-3.1-8B on 10% of the Tulu 3 SFT mixture."""

    dataset_mixer: list[str] = _field(
        ["allenai/tulu-3-sft-mixture=10%"], "one or more SOURCE[@REVISION][:SPLIT][=AMOUNT]"
    )


@dataclass
class DPOConfig(TrainConfig):
    """train_dpo.py: no flags = DPO on the model that train_sft.py exported."""

    model_name_or_path: str = _field("output/sft", "hub id or folder of the model to fine-tune")
    dataset_mixer: list[str] = _field(
        ["allenai/llama-3.1-tulu-3-8b-preference-mixture=10%"], "one or more SOURCE[@REVISION][:SPLIT][=AMOUNT]"
    )
    max_seq_length: int = _field(2048, "prompt plus completion keep their first max_seq_length tokens", least=2)
    learning_rate: float = _field(5e-7, "peak learning rate", least=0)
    warmup_ratio: float = _field(0.1, "part of all steps that warms up", least=0, most=1)
    num_train_epochs: int = _field(1, "passes over the data", least=1, most=10**9)
    output_dir: str = _field("output/dpo", "model, metrics and checkpoints go here")
    checkpointing_steps: int | str = _field(
        100, "a checkpoint every so many steps, or every epoch", ("epoch",), least=1
    )
    loss_type: str = _field("dpo_norm", "the preference loss", ("sigmoid", "dpo_norm", "ipo", "simpo"))
    beta: float = _field(5.0, "how strongly the policy is held to the reference", least=0)
    label_smoothing: float = _field(
        0.0, "assumed share of flipped preferences (sigmoid and dpo_norm)", least=0, most=0.5
    )
    gamma_beta_ratio: float = _field(0.3, "simpo's target margin over beta", least=0)
    ref_model_name_or_path: str | None = _field(None, "a reference that is not the starting policy")
    share_prompt: bool = _field(True, "run a pair's prompt once for both completions")


def parse_config(cls: type, argv: list[str] | None = None):
    """The validated config of one run.

    argv: the command line without the program's name (None: sys.argv).
    Raises UserError for anything that is not a setting or not a value of it. `--help` prints and exits 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print_line(_help(cls))
        raise SystemExit(0)
    names = {f.name for f in dataclasses.fields(cls)}
    given, config_file = _split_argv(argv, names | {"config", "local_rank"})
    given.pop("local_rank", None)  # the deepspeed launcher adds it; the environment says the same
    values = {}
    if config_file is not None:
        for name, value in _read_yaml(config_file).items():
            if name not in names:
                raise UserError(f"{config_file}: unknown name `{name}`{_nearest(name, names)}")
            values[name] = (value, f"{config_file}: {name}")
    for name, value in given.items():
        values[name] = (value, f"--{name}")
    hints = typing.get_type_hints(cls)
    config = cls(**{name: _convert(hints[name], value, where) for name, (value, where) in values.items()})
    for name in PATHS & names:
        setattr(config, name, _expanded(getattr(config, name), name))
    _validate(config)
    return config


def _expanded(value, name: str):
    """A path, or a list of them, with ~ written out."""
    if isinstance(value, list):
        return [_expanded(item, name) for item in value]
    if value is None or not value.startswith("~"):
        return value
    if (path := os.path.expanduser(value)) == value:
        raise UserError(f"--{name} {value}: there is no such user's folder")
    return path


def _split_argv(argv: list[str], names: set[str]) -> tuple[dict, str | None]:
    given: dict = {}
    i = 0
    while i < len(argv):
        word = argv[i]
        if not word.startswith("--"):
            raise UserError(f"`{word}` is not a flag; flags are written --name value")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in names:
            raise UserError(f"unknown flag --{name}{_nearest(name, names - {'local_rank'}, '--')}")
        i += 1
        if equals:
            words = [value]
        else:
            end = i
            while end < len(argv) and not argv[end].startswith("--"):
                end += 1
            words, i = argv[i:end], end
        if not words:
            raise UserError(f"--{name} needs a value")
        if len(words) > 1 and name != "dataset_mixer":
            raise UserError(f"`{words[1]}` is not a flag; --{name} takes one value")
        given[name] = words if name == "dataset_mixer" else words[0]  # of a flag given twice the last one counts
    return given, given.pop("config", None)


class _UniqueKeys(yaml.SafeLoader):
    """In which a name that comes twice is an error, as it is in YAML's own specification."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.YAMLError(f"`{twice[0]}` comes twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict:
    with (
        as_user_error(f"--config {path}", OSError),
        as_user_error(f"--config {path}: not YAML", yaml.YAMLError, ValueError, RecursionError),
    ):
        content = yaml.load(
            Path(path).read_text(encoding="utf-8"), _UniqueKeys
        )  # ValueError: no UTF-8, no number, no date
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold `name: value` lines, not a {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def _nearest(name: str, names: set[str], prefix: str = "") -> str:
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{match[0]}?" if match else "; --help lists them all"


def _convert(hint, value, where: str):
    """`value`, from YAML or as typed, as the field's type. YAML reads 5e-6 as text, so text is parsed here."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    text = value.strip() if isinstance(value, str) else value
    if type(None) in options and (text is None or (isinstance(text, str) and text.lower() in ("none", "null", ""))):
        return None
    if hint == list[str]:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) and item.strip() for item in items):
            raise UserError(f"{where}: must be SOURCE[@REVISION][:SPLIT][=AMOUNT] texts, not {value!r}")
        return [item.strip() for item in items]
    for option in options:
        if option is bool:
            if isinstance(text, bool):
                return text
            if isinstance(text, str) and text.lower() in ("true", "false"):
                return text.lower() == "true"
        elif option in (int, float) and not isinstance(text, bool) and isinstance(text, (int, float, str)):
            try:
                number = option(text)
            except (ValueError, OverflowError):
                continue
            if number == text or isinstance(text, str):
                return number
        elif option is str and isinstance(text, str) and text:
            return text
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "none"}
    raise UserError(f"{where}: must be {' or '.join(names[o] for o in options)}, not {value!r}")


def _validate(config: TrainConfig) -> None:
    """Raises UserError for a value out of its range. What depends on data or model is checked where those are read."""

    def require(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise UserError(f"--{name} must be {rule}, not {getattr(config, name)!r}")

    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        least, most = f.metadata["least"], f.metadata["most"]
        if value is None or value in choices:
            continue
        names = [_written(choice) for choice in choices]
        if least is not None:
            span = f"between {least} and {most}" if most < math.inf else f"{least} or more"
            is_within = not isinstance(value, str) and least <= value <= most and value != math.inf
            require(is_within, f.name, f"{'finite, ' * isinstance(value, float)}{', or '.join([span, *names])}")
        elif choices:
            near = _nearest(str(value), set(names)).removeprefix("; ")
            require(False, f.name, f"one of {', '.join(names)} ({near})")
    require(config.adam_beta1 < 1, "adam_beta1", "below 1")
    require(config.adam_beta2 < 1, "adam_beta2", "below 1")
    require(config.adam_epsilon >= 1e-30, "adam_epsilon", "at least 1e-30")
    require(config.max_grad_norm == 0 or config.max_grad_norm >= 1e-30, "max_grad_norm", "0 (never) or at least 1e-30")
    if isinstance(config, DPOConfig):
        require(config.beta > 0, "beta", "above 0")


def _written(value) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return " ".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _help(cls: type) -> str:
    lines = [(cls.__doc__ or "").strip(), "", "--config FILE.yaml  the same names; the command line wins", ""]
    defaults = cls()
    for f in dataclasses.fields(cls):
        choices = f" ({', '.join(map(_written, f.metadata['choices']))})" if f.metadata["choices"] else ""
        lines.append(f"--{f.name} [{_written(getattr(defaults, f.name))}]\n    {f.metadata['help']}{choices}")
    return "\n".join(lines)
