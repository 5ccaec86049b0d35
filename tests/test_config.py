"""Every setting has one parser and one validation, and a mistake is one clear line: pytest tests/test_config.py"""

import dataclasses
import os

import pytest

from common.config import PATHS, DPOConfig, SFTConfig, parse_config
from common.failures import UserError


def sft(*argv):
    return parse_config(SFTConfig, list(argv))


def dpo(*argv):
    return parse_config(DPOConfig, list(argv))


def refusal(cls, *argv) -> str:
    with pytest.raises(UserError) as error:
        parse_config(cls, list(argv))
    message = str(error.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


# ------------------------------------------------------------------ what is accepted


def test_defaults_are_the_contracts():
    config = sft()
    expected = {
        "model_name_or_path": "meta-llama/Llama-3.1-8B",
        "model_revision": None,
        "tokenizer_name_or_path": None,
        "dtype": "bfloat16",
        "attn_implementation": "auto",
        "dataset_mixer": ["allenai/tulu-3-sft-mixture=10%"],
        "max_seq_length": 4096,
        "chat_template": "tulu",
        "global_batch_size": 128,
        "max_tokens_per_micro_batch": "auto",
        "gradient_checkpointing": "auto",
        "optimizer": "adamw",
        "learning_rate": 5e-6,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.03,
        "weight_decay": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "num_train_epochs": 2,
        "max_train_steps": None,
        "seed": 42,
        "output_dir": "output/sft",
        "checkpointing_steps": 500,
        "keep_last_n_checkpoints": 3,
        "clean_checkpoints_at_end": False,
        "resume": "auto",
        "cache_dir": os.path.expanduser("~/.cache/plaintune"),
        "collective_timeout_minutes": 30,
        "logging_steps": 1,
        "ds_config": "ds_configs/zero3.json",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    config = dpo()
    expected |= {
        "model_name_or_path": "output/sft",
        "dataset_mixer": ["allenai/llama-3.1-tulu-3-8b-preference-mixture=10%"],
        "max_seq_length": 2048,
        "learning_rate": 5e-7,
        "warmup_ratio": 0.1,
        "num_train_epochs": 1,
        "output_dir": "output/dpo",
        "checkpointing_steps": 100,
        "loss_type": "dpo_norm",
        "beta": 5.0,
        "label_smoothing": 0.0,
        "gamma_beta_ratio": 0.3,
        "ref_model_name_or_path": None,
        "share_prompt": True,
    }
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "3e-4"],
        ["--learning-rate", "3e-4"],
        ["--learning_rate=3e-4"],
        ["--learning-rate=3e-4"],
        ["--learning_rate", "1", "--learning_rate", "3e-4"],
    ],
)
def test_ways_to_write_a_flag(argv):
    assert sft(*argv).learning_rate == 3e-4


def test_a_home_folder_is_written_out_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = [name for name in PATHS if name != "dataset_mixer"]
    config = dpo("--dataset_mixer", "~/a.jsonl=5", "org/b", *(word for name in names for word in (f"--{name}", "~/x")))
    assert config.dataset_mixer == ["/home/me/a.jsonl=5", "org/b"]
    assert {getattr(config, name) for name in names} == {"/home/me/x"}
    with pytest.raises(UserError, match="--cache_dir ~nobody-here/x: there is no such user's folder"):
        sft("--cache_dir", "~nobody-here/x")


def test_values_get_their_types():
    config = dpo(
        "--share_prompt",
        "False",
        "--max_train_steps",
        "none",
        "--checkpointing_steps",
        "epoch",
        "--gradient_checkpointing",
        "3",
        "--max_tokens_per_micro_batch",
        "512",
        "--seed",
        "0",
        "--model_revision",
        "v1",
        "--dataset_mixer",
        "a.jsonl=10%",
        "b.jsonl",
        "--local_rank",
        "3",
        "--weight_decay",
        "1",
    )
    assert config.share_prompt is False and config.max_train_steps is None and config.checkpointing_steps == "epoch"
    assert (config.gradient_checkpointing, config.max_tokens_per_micro_batch, config.seed) == (3, 512, 0)
    assert config.dataset_mixer == ["a.jsonl=10%", "b.jsonl"]
    assert isinstance(config.weight_decay, float)
    assert [sft("--compile_layers", text).compile_layers for text in ("true", "False", "auto")] == [True, False, "auto"]


def test_local_rank_with_an_equals_sign_is_the_launchers():
    assert sft("--local_rank=1", "--seed", "7").seed == 7


def test_yaml_is_overridden_by_the_command_line(yaml_file):
    path = yaml_file(
        "learning_rate: 5e-6\nseed: 3\ndataset_mixer: [a.jsonl, b.jsonl=5]\nmax_train_steps: 9\nmodel_revision: null\n"
        "checkpointing_steps: epoch\nclean_checkpoints_at_end: true\nwarmup_ratio: 0\n"
    )
    config = sft("--seed", "4", "--config", path)
    assert config.learning_rate == 5e-6, "YAML reads 5e-6 as text"
    assert (config.seed, config.max_train_steps, config.checkpointing_steps) == (4, 9, "epoch")
    assert config.dataset_mixer == ["a.jsonl", "b.jsonl=5"]
    assert config.clean_checkpoints_at_end is True and config.warmup_ratio == 0
    assert config.weight_decay == 0, "what neither names keeps its default"


def test_an_empty_yaml_file_and_one_source_as_text(yaml_file):
    assert sft("--config", yaml_file("")) == sft()
    assert sft("--config", yaml_file("dataset_mixer: a.jsonl")).dataset_mixer == ["a.jsonl"]


def test_help_lists_every_flag_and_exits_0(capsys):
    with pytest.raises(SystemExit) as end:
        dpo("--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{f.name} " in shown for f in dataclasses.fields(DPOConfig))


# ------------------------------------------------------------------ what is refused, and with what words


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--learning_rat", "--learning_rate"),
        ("--gloabl_batch_size", "--global_batch_size"),
        ("--max-seq-len", "--max_seq_length"),
        ("--dataset_mix", "--dataset_mixer"),
        ("--beta2", "--adam_beta2"),
    ],
)
def test_a_typo_in_a_flag_names_the_nearest(flag, nearest):
    message = refusal(SFTConfig, flag, "1")
    assert flag.replace("-", "_").strip("_") in message.replace("-", "_")
    assert f"did you mean {nearest}?" in message


def test_a_flag_of_the_other_script_is_unknown_here():
    assert "--beta" in refusal(SFTConfig, "--beta", "1")


def test_yaml_names_its_unknown_name(yaml_file):
    path = yaml_file("learning_rte: 1e-5\n")
    message = refusal(SFTConfig, "--config", path)
    assert path in message and "learning_rte" in message and "did you mean learning_rate?" in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- a\n- b\n", "name: value"),
        ("a: [", "not YAML"),
        ("seed: 1\nbeta: 2\nseed: 2\n", "`seed` comes twice"),
        ("output_dir: 2020-99-99\n", "not YAML"),
        ("[" * 3000, "not YAML"),
        ("seed: [1]", "whole number"),
        ("seed: true", "whole number"),
        ("learning_rate: fast", "a number"),
        ("share_prompt: 1", "true or false"),
        ("dataset_mixer: []", "SOURCE"),
        ("dataset_mixer: [1]", "SOURCE"),
        ("output_dir: 5", "text"),
        ("seed: null", "whole number"),
        ("config: x.yaml", "config"),
        ("global_batch_size: 2.5", "whole number"),
    ],
)
def test_yaml_of_the_wrong_kind(yaml_file, text, named):
    path = yaml_file(text)
    message = refusal(DPOConfig, "--config", path)
    assert path in message and named in message


def test_yaml_that_is_not_there(tmp_path):
    assert str(tmp_path / "no.yaml") in refusal(SFTConfig, "--config", str(tmp_path / "no.yaml"))


@pytest.mark.parametrize(
    "argv", [["5"], ["-x"], ["--seed"], ["--seed", "1", "2"], ["--config"], ["--", "1"], ["--seed="]]
)
def test_words_that_are_no_flag_and_value(argv):
    refusal(SFTConfig, *argv)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", "-1e-5"),
        ("learning_rate", "fast"),
        ("weight_decay", "-0.1"),
        ("max_grad_norm", "-1"),
        ("warmup_ratio", "1.5"),
        ("adam_beta2", "1.0"),
        ("adam_epsilon", "0"),
        ("adam_epsilon", "1e-60"),
        ("max_grad_norm", "1e-31"),
        ("max_train_steps", "1" + "0" * 400),
        ("num_train_epochs", "1" + "0" * 400),
        ("adam_beta2", "1.0"),
        ("global_batch_size", "0"),
        ("global_batch_size", "1.5"),
        ("global_batch_size", "-3"),
        ("max_seq_length", "1"),
        ("num_train_epochs", "0"),
        ("max_train_steps", "0"),
        ("stop_after_steps", "0"),
        ("logging_steps", "0"),
        ("keep_last_n_checkpoints", "0"),
        ("collective_timeout_minutes", "0"),
        ("checkpointing_steps", "0"),
        ("checkpointing_steps", "epochs"),
        ("max_tokens_per_micro_batch", "0"),
        ("max_tokens_per_micro_batch", "big"),
        ("gradient_checkpointing", "-1"),
        ("gradient_checkpointing", "some"),
        ("dtype", "float16"),
        ("attn_implementation", "eager"),
        ("optimizer", "sgd"),
        ("lr_scheduler_type", "liner"),
        ("seed", "-1"),
        ("seed", str(2**63)),
        ("seed", "x"),
        ("clean_checkpoints_at_end", "yes"),
        ("beta", "0"),
        ("beta", "-1"),
        ("label_smoothing", "0.51"),
        ("label_smoothing", "-0.1"),
        ("gamma_beta_ratio", "-1"),
        ("loss_type", "dpo"),
        ("share_prompt", "maybe"),
    ],
)
def test_a_value_out_of_range_names_its_flag(name, value):
    message = refusal(DPOConfig, f"--{name}", value)
    assert f"--{name}" in message and (value in message or repr(float(value)) in message)


def test_a_misspelt_choice_names_the_nearest():
    assert "did you mean linear?" in refusal(SFTConfig, "--lr_scheduler_type", "liner")
    assert "did you mean bfloat16?" in refusal(SFTConfig, "--dtype", "bfloat")
    assert "one of true, false, auto" in refusal(SFTConfig, "--compile_layers", "sometimes")


@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing", "0.5"), ("warmup_ratio", "1"), ("max_grad_norm", "0"), ("learning_rate", "0")],
)
def test_the_edge_of_a_range_is_inside(name, value):
    assert getattr(dpo(f"--{name}", value), name) == float(value)
