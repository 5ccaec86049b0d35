"""Every setting of a run: one flat dataclass per script, one parser.

The dataclass owns what is learned; ds_configs/*.json owns how it is placed on devices. Values come from the defaults
below, then from `--config FILE.yaml`, then from the command line, each overriding the one before.
"""

import argparse
import contextlib
import copy
import dataclasses
import difflib
import importlib.metadata
import math
import os
import sys
import typing

import yaml

from common.failures import UserError, as_user_error, named_file, print_line


def _field(default, help, choices=(), least=-math.inf, most=math.inf, below=math.inf, identifies=True, is_path=False):
    """One flag. Its type says whether it takes text, numbers, true and false, or none.

    choices: the texts that it takes, of an `int | str` beside numbers; (): any text.
    least, most, below: the range of a number; most belongs to it, below does not.
    identifies: whether a run with another value is another run; "contents": whether a digest of what it names does.
    is_path: a leading ~ is the home folder.
    """
    nature = {"help": help, "choices": choices, "least": least, "most": most, "below": below, "identifies": identifies}
    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=nature | {"is_path": is_path})


LENGTHS = ("num_train_epochs", "max_train_steps")  # of a run
LR_SCHEDULERS = ["linear", "cosine", "constant", "constant_with_warmup"]
LR_SCHEDULERS += ["inverse_sqrt", "cosine_with_restarts", "polynomial"]
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
RECOMPUTED = ("auto", "none", "full")
KERNELS = ("auto", "flash_attention_4", "flash_attention_2", "varlen", "sdpa")
OWN_BETA = {"dpo_norm": 5.0, "sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0}  # of each loss, where beta is left out

# A flag, as it is to be written here: what TRL and Hugging Face call it.
OTHER_NAMES = {
    "--model_name_or_path": "model model_id model_name",
    "--ref_model_name_or_path": "ref_model ref_model_name",
    "--tokenizer_name_or_path": "tokenizer tokenizer_name processing_class",
    "--dtype bfloat16": "bf16 fp16",
    "--dtype": "torch_dtype fp32",
    "--dataset_mixer SOURCE[:SPLIT][=AMOUNT]": "dataset dataset_name dataset_config dataset_train_split train_file",
    "--eval_dataset_mixer SOURCE[:SPLIT][=AMOUNT]": "eval_dataset dataset_test_split validation_file",
    "--eval_holdout 1%": "validation_split_percentage",
    "--max_seq_length": "max_length max_prompt_length max_completion_length model_max_length",
    "--max_tokens_per_micro_batch (samples are always packed)": "packing padding_free per_device_eval_batch_size",
    "--global_batch_size (over all ranks)": "per_device_train_batch_size gradient_accumulation_steps batch_size",
    "--optimizer": "optim",
    "--learning_rate": "lr",
    "--lr_scheduler_type": "lr_scheduler scheduler",
    "--warmup_ratio": "warmup_steps",
    "--num_train_epochs": "epochs num_epochs",
    "--max_train_steps": "max_steps",
    "--seed": "data_seed",
    "--checkpointing_steps": "save_steps save_strategy",
    "--keep_last_n_checkpoints": "save_total_limit",
    "--resume": "resume_from_checkpoint",
    "--resume never": "overwrite_output_dir",
    "--eval_steps": "eval_strategy evaluation_strategy",
    "--collective_timeout_minutes": "ddp_timeout",
    "--compile_layers": "torch_compile",
    "--ds_config": "deepspeed",
}


@dataclasses.dataclass
class TrainConfig:
    """What SFT and DPO have in common."""

    # model
    model_name_or_path: str = _field("meta-llama/Llama-3.1-8B", "hub id or folder", identifies="contents", is_path=True)
    model_revision: str | None = _field(None, "branch, tag or commit of the model on the hub", identifies="contents")
    tokenizer_name_or_path: str | None = _field(None, "tokenizer, when it is not the model's own", is_path=True)
    dtype: str = _field("bfloat16", "of weights and activations; AdamW and sums use float32", ("bfloat16", "float32"))
    attn_implementation: str = _field("auto", "packed attention; varlen is torch's own", KERNELS, identifies=False)

    # data
    dataset_mixer: list[str] = _field([], "SOURCE[@REVISION][:SPLIT][=AMOUNT]", identifies="contents", is_path=True)
    max_seq_length: int = _field(4096, "a sample (DPO: prompt plus completion) keeps its first so many tokens", least=2)
    chat_template: str = _field("auto", "auto, tokenizer, tulu or a .jinja file", identifies="contents", is_path=True)
    chat_template_kwargs: str | None = _field(None, "JSON object of names that the template sees")
    allow_dropped: bool = _field(False, "train although over a tenth of a source is dropped", identifies=False)
    cache_dir: str = _field("~/.cache/plaintune", "token and reference caches", identifies=False, is_path=True)

    # batch
    global_batch_size: int = _field(128, "samples (SFT) or pairs (DPO) per optimizer step, over all ranks", least=1)
    seed: int = _field(42, "decides the order of the samples", least=0, most=2**63 - 1)

    # optimizer
    optimizer: str = _field("adamw", "the optimizer", ("adamw",))
    learning_rate: float = _field(5e-6, "peak learning rate", least=0)
    weight_decay: float = _field(0.0, "AdamW's decoupled weight decay, on every parameter", least=0)
    adam_beta1: float = _field(0.9, "AdamW's beta1", least=0, below=1)
    adam_beta2: float = _field(0.999, "AdamW's beta2", least=0, below=1)
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon", least=1e-30)
    router_aux_loss_coef: float = _field(0.0, "weight of the experts' balancing loss, a mean over samples", least=0)
    max_grad_norm: float = _field(1.0, "gradients are scaled down to this global norm; 0 = never", least=0)

    # schedule
    lr_scheduler_type: str = _field("linear", "schedule, by transformers' names", LR_SCHEDULERS)
    warmup_ratio: float = _field(0.03, "part of all steps that warms up", least=0, most=1)
    num_train_epochs: int = _field(2, "passes over the data", least=1, most=10**9)
    max_train_steps: int | None = _field(None, "optimizer steps, in place of num_train_epochs", least=1, most=10**9)
    stop_after_steps: int | None = _field(None, "end early, on the same schedule", least=1, identifies=False)

    # evaluation
    eval_dataset_mixer: list[str] = _field([], "held-out data, as dataset_mixer", identifies=False, is_path=True)
    eval_holdout: str | None = _field(None, "held out of the training rows: 1% or 200")
    eval_steps: int | None = _field(None, "steps between evaluations; none: ten a run", least=1, identifies=False)
    early_stopping_patience: int | None = _field(None, "evaluations without a gain", least=1, identifies=False)
    keep_best: str | None = _field(None, "keep its best checkpoint, too", ("eval/loss",), identifies=False)
    export_best: bool = _field(False, "the model of that one, not of the last step", identifies=False)

    # run
    output_dir: str = _field("output/sft", "model, metrics and checkpoints go here", identifies=False, is_path=True)
    resume: str = _field("auto", "auto, never (start over), or a checkpoint's path", identifies=False, is_path=True)
    checkpointing_steps: int | str = _field(500, "steps between checkpoints", ("epoch",), least=1, identifies=False)
    keep_last_n_checkpoints: int = _field(3, "older checkpoints are deleted", least=1, identifies=False)
    clean_checkpoints_at_end: bool = _field(False, "delete the checkpoints after the export", identifies=False)
    export_at_checkpoints: bool = _field(False, "the model of each checkpoint too", identifies=False)
    logging_steps: int = _field(1, "write metrics every so many steps", least=1, identifies=False)
    report_to: list[str] = _field(["none"], "trackers that metrics also go to", TRACKERS, identifies=False)
    push_to_hub: bool = _field(False, "upload the model to the hub when it is done", identifies=False)
    hub_model_id: str | None = _field(None, "ENTITY/NAME, or NAME [output_dir's] of your own", identifies=False)
    hub_private: bool = _field(True, "the repository is private", identifies=False)
    hub_overwrite: bool = _field(False, "replace another run's model there", identifies=False)
    gpu_hour_price: float | None = _field(None, "the plan says what a run costs", least=0, identifies=False)
    collective_timeout_minutes: int = _field(30, "a rank waits so long", least=1, most=10**6, identifies=False)

    # placement
    max_tokens_per_micro_batch: int | str = _field("auto", "per rank and pass", ("auto",), least=1, identifies=False)
    gradient_checkpointing: int | str = _field("auto", "layers recomputed", RECOMPUTED, least=0, identifies=False)
    compile_layers: bool | str = _field("auto", "torch.compile; auto = on a GPU", ("auto",), identifies=False)
    ds_config: str = _field("ds_configs/zero3.json", "how ZeRO-3 places the work", identifies=False, is_path=True)


def _same(name: str, default):
    """TrainConfig's flag with another default."""
    return _field(default, **next(f.metadata for f in dataclasses.fields(TrainConfig) if f.name == name))


@dataclasses.dataclass
class SFTConfig(TrainConfig):
    """train_sft.py: no flags = Llama-3.1-8B on 10% of the Tulu 3 SFT mixture."""

    dataset_mixer: list[str] = _same("dataset_mixer", ["allenai/tulu-3-sft-mixture=10%"])


@dataclasses.dataclass
class DPOConfig(TrainConfig):
    """train_dpo.py: no flags = DPO on the model that train_sft.py exported."""

    model_name_or_path: str = _same("model_name_or_path", "output/sft")
    dataset_mixer: list[str] = _same("dataset_mixer", ["allenai/llama-3.1-tulu-3-8b-preference-mixture=10%"])
    max_seq_length: int = _same("max_seq_length", 2048)
    learning_rate: float = _same("learning_rate", 5e-7)
    warmup_ratio: float = _same("warmup_ratio", 0.1)
    num_train_epochs: int = _same("num_train_epochs", 1)
    output_dir: str = _same("output_dir", "output/dpo")
    checkpointing_steps: int | str = _same("checkpointing_steps", 100)

    # loss
    loss_type: str = _field("dpo_norm", "the preference loss", ("sigmoid", "dpo_norm", "ipo", "simpo"))
    beta: float = _field(5.0, "how strongly the reference holds; left out: 0.1 (sigmoid, ipo), 2 (simpo)", least=1e-30)
    label_smoothing: float = _field(0.0, "share of flipped preferences (sigmoid and dpo_norm)", least=0, most=0.5)
    gamma_beta_ratio: float = _field(0.3, "simpo's target margin over beta", least=0)
    ref_model_name_or_path: str | None = _field(None, "another reference", identifies="contents", is_path=True)
    share_prompt: bool = _field(True, "run a pair's prompt once for both completions", identifies=False)


def identity_values(config: TrainConfig, kinds: tuple = (True,)) -> dict:
    """The settings whose values identify a run; kinds (True, "contents"): all that decide its result.

    Not how long it is where no step depends on that: a run of a constant learning rate goes on for more epochs.
    """
    free = LENGTHS if config.lr_scheduler_type == "constant" and kinds == (True,) else ()
    fields = [f for f in dataclasses.fields(config) if f.metadata["identifies"] in kinds and f.name not in free]
    return {f.name: getattr(config, f.name) for f in fields}


def as_words(values: dict) -> list[str]:
    """Values of flags, by their names, as words of a command line."""
    words: list[str] = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words


def parse_config(cls: type, argv: list[str] | None = None):
    """The validated config of one run.

    argv: the command line without the program's name (None: sys.argv).
    Raises UserError for anything that is not a setting or not a value of it. `--help` prints and exits 0.
    """
    argv = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=cls.__doc__, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with the same names; the command line wins")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; the environment has it
    defaults = vars(cls())
    for f in dataclasses.fields(cls):
        read, rule = _reader(f)
        help = f"{f.metadata['help']}: {rule} [{_written(defaults[f.name])}]".replace("%", "%%")
        num_words = ("+" if defaults[f.name] else "*") if f.type == list[str] else None
        parser.add_argument(f"--{f.name}", type=read, nargs=num_words, default=defaults[f.name], metavar="X", help=help)
    if {"-h", "--help"} & {*argv}:
        if os.environ.get("RANK", "0") == "0":
            print_line(parser.format_help())
        raise SystemExit(0)

    parser.set_defaults(beta=None)
    known = {*defaults, "config", "local_rank"}
    given = _parsed(parser, argv, known)
    if given.config is not None:
        with as_user_error(f"--config {given.config}: must hold `name: value` lines"):
            settings = yaml.load(named_file(given.config).read_text(encoding="utf-8"), _AsWritten)
            words = as_words(settings or {})
            if mappings := [name for name, value in (settings or {}).items() if isinstance(value, dict)]:
                raise ValueError(f"--{mappings[0]} is a mapping; write JSON in quotes")
        _parsed(parser, words, {*defaults}, source=f"{given.config}: ")
        given = _parsed(parser, [*words, *argv], known)
    for name in {*given.report_to} - {"none"}:
        with as_user_error(f"--report_to {name} needs its package ({sys.executable} -m pip install {name})"):
            importlib.metadata.version(name)
    if given.beta is None and cls is DPOConfig:
        given.beta = OWN_BETA[given.loss_type]
    if given.eval_dataset_mixer and given.eval_holdout:
        raise UserError("--eval_dataset_mixer and --eval_holdout: give one of them")
    for name in ("eval_steps", "early_stopping_patience", "keep_best"):
        if getattr(given, name) is not None and not given.eval_dataset_mixer and not given.eval_holdout:
            raise UserError(f"--{name}: nothing is held out; give --eval_dataset_mixer or --eval_holdout")
    if given.export_best and given.keep_best is None:
        raise UserError("--export_best true: no checkpoint is kept as the best; give --keep_best eval/loss")
    return cls(**{name: getattr(given, name) for name in defaults})


def _underscored(word: str) -> str:
    """--some-flag as --some_flag; a value is left as it is."""
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _parsed(parser, words: list[str], known: set[str], source: str = "") -> argparse.Namespace:
    """The values in words, else the defaults. known: the names allowed; source: how the text of an error begins."""
    names = {name: flag for flag, others in OTHER_NAMES.items() for name in others.split()}
    unknown = []
    for flag in dict.fromkeys(word[2:].partition("=")[0] for word in words if word.startswith("--")):
        if flag in names:
            unknown.append(f"unknown flag --{flag}: here it is {names[flag]}")
        elif flag not in known:
            nearest = difflib.get_close_matches(flag, known, 1, 0.5) or ["help"]
            unknown.append(f"unknown flag --{flag}: did you mean --{nearest[0]}?")
    if unknown:
        raise UserError(source + "; ".join(unknown))
    try:
        given, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as e:
        raise UserError(f"{source}{e}") from None
    if unknown:
        raise UserError(f"{source}`{unknown[0]}` is not a flag; flags are written --name value")
    return given


class _AsWritten(yaml.BaseLoader):
    """YAML whose values are texts as written (5e-6, null, 0123). A name that comes twice is an error, and so is an
    alias: a few lines of aliases of aliases are gigabytes of text."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (`*name`) is not taken; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise yaml.YAMLError(f"`{twice[0]}` comes twice")
        return super().construct_mapping(node, deep)


def _reader(field: dataclasses.Field) -> tuple:
    """The function from a word of a flag to its value, and in words what it takes: `auto or a whole number >= 1`."""
    kinds, nature, none = typing.get_args(field.type) or (field.type,), field.metadata, type(None)
    fixed = [*nature["choices"], *(bool in kinds) * (True, False), *(none in kinds) * (None,)]
    named = {_written(value): value for value in fixed}
    number = next((kind for kind in (int, float) if kind in kinds), None)
    takes_text = str in kinds and not nature["choices"]
    bounds = {">=": nature["least"], "<=": nature["most"], "<": nature["below"]}
    span = " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if math.isfinite(bound))
    others = [f"a {'whole' if number is int else 'finite'} number {span}"] if number else ["text"] * takes_text
    rule = " or ".join([*named, *others])

    def read(word: str):
        word = word.strip()
        if word.lower() in named:
            return named[word.lower()]
        if none in kinds and word in ("", "null", "~"):  # as YAML writes it
            return None
        if number:
            with contextlib.suppress(ValueError):
                value = number(word)
                if nature["least"] <= value <= nature["most"] and value < nature["below"]:
                    return value
        elif word and takes_text:
            return os.path.expanduser(word) if nature["is_path"] else word
        raise argparse.ArgumentTypeError(f"must be {rule}, not {word!r}")

    return read, rule


def _written(value) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return " ".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
