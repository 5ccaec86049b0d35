"""Fixtures that several test modules share."""

import os
from pathlib import Path

import launch
import models
import pytest
import torch


def pytest_configure(config):
    """The suite runs on the CPU, also where there is a GPU; `-m cuda` alone uses it."""
    if config.option.markexpr.strip() != "cuda":
        os.environ.update(launch.CPU_ENVIRONMENT)
        torch.set_num_threads(1)  # models here are too small for two


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository (PLAINTUNE_SHARED names another); skips where there is none."""
    folder = Path(os.environ.get("PLAINTUNE_SHARED") or launch.REPO.parent / "shared")
    if not folder.is_dir():
        pytest.skip("no shared data here")
    return folder


@pytest.fixture(params=["fifo", "/dev/zero"])
def endless_file(request, tmp_path) -> str:
    """What may be named in place of a file and never ends."""
    if request.param == "fifo":
        os.mkfifo(tmp_path / "fifo.jsonl")
    return request.param if request.param[0] == "/" else str(tmp_path / "fifo.jsonl")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A float32 Llama with its tokenizer."""
    return models.make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def sft_data(tmp_path_factory) -> Path:
    """10 conversations."""
    return models.write_jsonl(tmp_path_factory.mktemp("sft") / "conversations.jsonl", models.conversations(10))


@pytest.fixture(scope="session")
def dpo_data(tmp_path_factory) -> Path:
    """10 preference pairs."""
    return models.write_jsonl(tmp_path_factory.mktemp("dpo") / "preferences.jsonl", models.preferences(10))
