"""One agreement of all ranks, before anything is trained: what hosts read, run and were asked for is the same."""

import dataclasses
import json
import os
import platform
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.config import TrainConfig, identity_values
from common.failures import UserError, shown
from common.files import file_digest, json_digest, weights_digest
from common.ranks import Ranks

CLOCKS_APART = 5.0  # seconds
PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy")
KERNELS = ("flash-attn", "flash-attn-4", "flash-linear-attention", "causal-conv1d", "mamba-ssm")  # that may be missing
# What libraries read of the environment that changes the numbers which they compute.
VARIABLES = ["CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NCCL_ALGO"]
VARIABLES += ["TORCH_BLAS_PREFER_CUBLASLT", "DISABLE_ADDMM_CUDA_LT", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"]
VARIABLES += ["NCCL_PROTO", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_DEFAULT_FPMATH_MODE"]
TOKENIZER_FILE = re.compile(r"(tokenizer|special_tokens|added_tokens|chat_template|vocab|merges).*")


def run_identity(config: TrainConfig, contents: dict[str, str]) -> dict:
    """Every value that decides what is trained, by the name under which a user knows it. contents: digests of what was
    read, by the flag that names it; of a model, for a new run may have overwritten an SFT folder."""
    return identity_values(config) | {f"{name} (contents)": value for name, value in contents.items()}


def agreed_identity(
    config: TrainConfig, digests: dict[str, str], tokenizer: str, models: dict[str, str], kernel: str, ranks: Ranks
) -> dict:
    """run_identity, once all ranks were found to agree on it. Collective.

    digests: of data and template, models: folders, by the flags that name them; tokenizer: its folder; kernel: of
    attention, by which no run is told from another. Raises UserError with a rank that differs and in what.
    """
    weights = ranks.once_per_node(lambda: {name: weights_digest(folder) for name, folder in models.items()})
    identity = run_identity(config, digests | weights)
    files = sorted(path for path in Path(tokenizer).iterdir() if TOKENIZER_FILE.fullmatch(path.name))
    beside = {"the attention kernel": kernel, "the tokenizer's files": files_digest(files)}
    require_agreement(lambda: identity | beside, ranks)
    if warning := clocks_apart(dict(ranks.gather(lambda: (socket.gethostname(), time.time())))):
        ranks.say(warning)
    return identity


def require_agreement(view: Callable[[], dict], ranks: Ranks) -> None:
    """Raises UserError with a rank whose view, values by name, is not rank 0's, and in what it differs. Collective."""
    views = ranks.on_all(lambda: (socket.gethostname(), view()))

    def compare() -> None:
        for rank, (host, theirs) in enumerate(views):
            if found := differences(views[0][1], theirs):
                raise UserError(f"rank {rank} ({host}) differs from rank 0 ({views[0][0]}) in {'; '.join(found)}")

    ranks.once(compare)  # so that it is told once, also where rank 0, which holds the store, is the first to end


def clocks_apart(clocks: dict[str, float]) -> str:
    """A warning of clocks of hosts, in seconds, read at the same time, that are CLOCKS_APART or more apart; else ""."""
    first, last = min(clocks, key=lambda host: clocks[host]), max(clocks, key=lambda host: clocks[host])
    slow, fast = clocks[first], clocks[last]
    what = f"the clock of {last} is {fast - slow:.0f} s ahead of that of {first}"
    return f"warning: {what}; times in logs and files do not agree" if fast - slow > CLOCKS_APART else ""


def environment(config: TrainConfig, ds_config: dict) -> dict:
    """What has to be the same on every host before anything is read: ranks that were asked for different things would
    wait for one another. By name. A path may differ from host to host, but not whether there is one."""
    view = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_free = field.metadata["is_path"] and value and value not in ("auto", "never")
        view[field.name] = "given" if is_free else value
    project = Path(__file__).parents[2]
    code = files_digest(sorted([*project.glob("train_*.py"), *project.glob("common/**/*.py")]))
    view |= {"this project's code": code, "ds_config (contents)": json.dumps(ds_config, sort_keys=True)}
    view |= {name: os.environ.get(name) for name in VARIABLES} | {"python": platform.python_version()}
    for package in PACKAGES + KERNELS:
        with suppress(PackageNotFoundError):
            view[f"version of {package}"] = version(package)
    return view


def files_digest(files: list[Path]) -> str:
    return json_digest([(path.name, file_digest(path)) for path in files])


def differences(ours: dict, theirs: dict) -> list[str]:
    """`name (their value, not ours)` of each that differs."""
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return [f"{name} ({shown(str(theirs.get(name)), 60)}, not {shown(str(ours.get(name)), 60)})" for name in names]
