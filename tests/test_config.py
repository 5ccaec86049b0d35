"""Every setting has one parser, and a mistake in one is one clear line: pytest tests/test_config.py"""

import dataclasses
import json
import os

import pytest

from common.config import OTHER_NAMES, DPOConfig, SFTConfig, identity_values, parse_config
from common.failures import UserError


def sft(*argv):
    return parse_config(SFTConfig, list(argv))


def dpo(*argv):
    return parse_config(DPOConfig, list(argv))


def refusal(parse, *argv) -> str:
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a text to a file and gives its path."""
    return lambda text: [(tmp_path / "run.yaml").write_text(text), str(tmp_path / "run.yaml")][1]


# ------------------------------------------------------------------ what is accepted

SHARED = """model_name_or_path meta-llama/Llama-3.1-8B, model_revision None, tokenizer_name_or_path None, dtype
bfloat16, attn_implementation auto, dataset_mixer ['allenai/tulu-3-sft-mixture=10%'], max_seq_length 4096,
chat_template auto, chat_template_kwargs None, allow_dropped False, global_batch_size 128,
max_tokens_per_micro_batch auto, gradient_checkpointing auto,
compile_layers auto, optimizer adamw, learning_rate 5e-06, lr_scheduler_type linear, warmup_ratio 0.03, weight_decay
0.0, adam_beta1 0.9, adam_beta2 0.999, adam_epsilon 1e-08, router_aux_loss_coef 0.0, max_grad_norm 1.0,
num_train_epochs 2, max_train_steps
None, stop_after_steps None, seed 42, output_dir output/sft, checkpointing_steps 500, keep_last_n_checkpoints 3,
clean_checkpoints_at_end False, resume auto, collective_timeout_minutes 30, logging_steps 1, ds_config
ds_configs/zero3.json, push_to_hub False, hub_model_id None, hub_private True, hub_overwrite False,
eval_dataset_mixer [], eval_holdout None, eval_steps None, early_stopping_patience None,
gpu_hour_price None, keep_best None, export_best False, export_at_checkpoints False, report_to ['none']"""
DPO = """model_name_or_path output/sft, dataset_mixer ['allenai/llama-3.1-tulu-3-8b-preference-mixture=10%'],
max_seq_length 2048, learning_rate 5e-07, warmup_ratio 0.1, num_train_epochs 1, output_dir output/dpo,
checkpointing_steps 100, loss_type dpo_norm, beta 5.0, label_smoothing 0.0, gamma_beta_ratio 0.3,
ref_model_name_or_path None, share_prompt True"""


def test_defaults_are_the_contracts():
    shared, changed = (dict(pair.split(maxsplit=1) for pair in text.split(",")) for text in (SHARED, DPO))
    shared["cache_dir"] = os.path.expanduser("~/.cache/plaintune")
    assert {name: str(value) for name, value in vars(sft()).items()} == shared
    assert {name: str(value) for name, value in vars(dpo()).items()} == shared | changed


WAYS = ("--learning_rate 3e-4", "--learning-rate 3e-4", "--learning_rate=3e-4", "--learning-rate=3e-4")
WAYS += ("--learning_rate 1 --learning_rate 3e-4", "--local_rank=1 --learning_rate 3e-4")


@pytest.mark.parametrize("words", WAYS)
def test_ways_to_write_a_flag(words):
    assert vars(sft(*words.split())) == vars(sft()) | {"learning_rate": 3e-4}


def test_a_home_folder_is_written_out_in_every_path_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = "model_name_or_path tokenizer_name_or_path ref_model_name_or_path chat_template output_dir resume cache_dir"
    paths = [*paths.split(), "ds_config"]
    config = dpo("--dataset_mixer", "~/a.jsonl=5", "org/b", *(f"--{name}=~/x" for name in [*paths, "model_revision"]))
    assert config.dataset_mixer == ["/home/me/a.jsonl=5", "org/b"]
    assert {getattr(config, name) for name in paths} == {"/home/me/x"} and config.model_revision == "~/x"


VALUES = [("share_prompt", "False", False), ("max_train_steps", "none", None), ("max_train_steps", "9", 9)]
VALUES += [("checkpointing_steps", "epoch", "epoch"), ("gradient_checkpointing", "3", 3), ("warmup_ratio", "1", 1.0)]
VALUES += [("gradient_checkpointing", "none", "none"), ("seed", "0", 0), ("model_revision", "null", None)]
VALUES += [("compile_layers", "true", True), ("compile_layers", "auto", "auto"), ("label_smoothing", "0.5", 0.5)]
# YAML alone would read an octal number, a date, and a text.
VALUES += [("model_revision", "0123456", "0123456"), ("output_dir", "2020-99-99", "2020-99-99")]
VALUES += [("learning_rate", "5e-6", 5e-6), ("learning_rate", "0", 0.0)]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_value_has_its_type_from_the_command_line_and_from_yaml(yaml_file, name, text, value):
    for config in (dpo(f"--{name}", text), dpo("--config", yaml_file(f"{name}: {text}"))):
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


def test_the_command_line_beats_yaml_beats_the_defaults(yaml_file):
    path = yaml_file("seed: 3\ndataset_mixer: [a.jsonl, b.jsonl=5]\nmax_train_steps: 9\n")
    config = sft("--seed", "4", "--config", path)
    assert (config.seed, config.max_train_steps, config.warmup_ratio) == (4, 9, 0.03)
    assert config.dataset_mixer == ["a.jsonl", "b.jsonl=5"]
    assert sft("--config", path, "--dataset_mixer", "c", "d").dataset_mixer == ["c", "d"]
    assert sft(f"--config={yaml_file('dataset_mixer: a.jsonl')}").dataset_mixer == ["a.jsonl"]
    assert sft("--config", yaml_file("")) == sft()
    assert sft("--config", yaml_file(json.dumps(vars(sft())))) == sft()  # as run_config.json has it


@pytest.mark.parametrize("rank", ["0", "1"])
def test_help_lists_every_flag_with_its_default_once_and_exits_0(capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as end:
        dpo("--no_such_flag", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert all((f"--{f.name} X" in shown.replace("[X", "X")) == (rank == "0") for f in dataclasses.fields(DPOConfig))
    assert ("AdamW's beta1: a finite number >= 0 and < 1 [0.9]" in shown) == (rank == "0")


def test_what_identifies_a_run():
    """Speed, logging and placement do not; what is read from files does by its contents, in agreement.run_identity."""
    free = "share_prompt max_tokens_per_micro_batch gradient_checkpointing ds_config output_dir stop_after_steps"
    by_contents = {"dataset_mixer", "chat_template", "model_name_or_path", "model_revision", "ref_model_name_or_path"}
    config = dpo("--seed", "7", "--beta", "2")
    by_value, all_values = identity_values(config), identity_values(config, (True, "contents"))
    assert by_value["seed"] == 7 and by_value["beta"] == 2 and {"dtype", "max_seq_length", "loss_type"} < {*by_value}
    assert {*all_values} - {*by_value} == by_contents and not {*all_values} & {*free.split()}


# ------------------------------------------------------------------ what is refused, and what the line names

NEAREST = {"learning_rat": "learning_rate", "max-seq-len": "max_seq_length", "beta2": "adam_beta2", "x": "help"}


@pytest.mark.parametrize(("flag", "nearest"), [*NEAREST.items(), ("beta", "adam_beta2")])  # --beta: the other script's
def test_a_typo_in_a_flag_names_the_nearest(yaml_file, flag, nearest):
    for words in ([f"--{flag}", "1"], [f"--{flag}=1"], ["--config", yaml_file(f"{flag}: 1")]):
        assert f"did you mean --{nearest}?" in refusal(sft, *words)


def test_names_of_other_trainers_are_answered_with_the_flag_here():
    flags = {field.name for field in dataclasses.fields(DPOConfig)}
    names = {name: flag for flag, others in OTHER_NAMES.items() for name in others.split()}
    assert not names.keys() & flags and {flag[2:].split()[0].split("=")[0] for flag in OTHER_NAMES} <= flags
    assert len(names) == sum(len(others.split()) for others in OTHER_NAMES.values())
    message = refusal(sft, *(f"--{name}=1" for name in names), "--sead", "3")
    for name, flag in names.items():
        assert f"unknown flag --{name}: here it is {flag}" in message
    assert "--sead: did you mean --seed?" in message


@pytest.mark.parametrize(("loss", "beta"), [("dpo_norm", 5.0), ("sigmoid", 0.1), ("ipo", 0.1), ("simpo", 2.0)])
def test_beta_left_out_is_the_losss_own(yaml_file, loss, beta):
    assert dpo("--loss_type", loss).beta == beta == dpo("--config", yaml_file(f"loss_type: {loss}")).beta
    assert dpo("--loss_type", loss, "--beta", "5").beta == 5.0 == dpo("--beta=5.0", f"--loss_type={loss}").beta


ALIASES = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]\n" for i in range(12))  # 9 ** 12 words
NOT_YAML = {ALIASES: "alias", "- a\n- b\n": "name: value", "a: [": "Error", "[" * 3000: "Error", "{[a]: b}": "Error"}
NOT_SETTINGS = {
    "seed: 1\nbeta: 2\nseed: 2\n": "`seed` comes twice",
    "config: x.yaml": "--config",
    "dataset_mixer: []": "--dataset_mixer",
    "seed: [1, 2]": "`2`",
    "seed: {a: 1}": "--seed",
    "chat_template_kwargs: {a: 1}": "JSON in quotes",
    "seed: null": "--seed",
}


@pytest.mark.parametrize(("text", "named"), [*NOT_YAML.items(), *NOT_SETTINGS.items()])
def test_yaml_of_the_wrong_kind(yaml_file, text, named):
    path = yaml_file(text)
    message = refusal(dpo, "--config", path)
    assert path in message and named in message


def test_a_config_that_never_ends_is_refused(endless_file):
    assert endless_file in refusal(dpo, "--config", endless_file)


NO_FLAGS = ["5", "-x", "--seed", "--seed 1 2", "--config", "-- 1", "--seed=", "--config no.yaml"]


@pytest.mark.parametrize("words", NO_FLAGS)
def test_words_that_are_no_flag_and_value(words):
    refusal(sft, *words.split())


WRONG = {
    "learning_rate": "nan inf -1e-5 fast",
    "adam_beta2": "1.0",
    "adam_epsilon": "0 1e-60",
    "max_train_steps": "0 1" + "0" * 400,
    "global_batch_size": "0 1.5 -3",
    "checkpointing_steps": "0 epochs",
    "gradient_checkpointing": "-1 some",
    "lr_scheduler_type": "liner",
    "seed": f"-1 x {2**63}",
    "clean_checkpoints_at_end": "yes",
    "compile_layers": "sometimes",
    "beta": "0 -1",
    "label_smoothing": "0.51 -0.1",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name].split()])
def test_a_value_out_of_range_names_its_flag(name, value):
    message = refusal(dpo, f"--{name}={value}")
    assert f"--{name}" in message and value in message
    assert f"--{name}" in refusal(dpo, f"--{name}", value)
