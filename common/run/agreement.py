"""One agreement of all ranks, before anything is trained: what hosts read, run and were asked for is the same."""

import dataclasses
import json
import platform
import re
import socket
import time
from importlib.metadata import version
from pathlib import Path

from common.config import TrainConfig, identity_values
from common.failures import UserError, shown
from common.files import file_digest, json_digest, weights_digest
from common.ranks import Ranks
from common.run.output_dir import PACKAGES

CLOCKS_APART = 5.0  # seconds
TOKENIZER_FILE = re.compile(r"(tokenizer|special_tokens|added_tokens|chat_template|vocab|merges).*")


def run_identity(config: TrainConfig, contents: dict[str, str]) -> dict:
    """Every value that decides what is trained, by the name under which a user knows it. contents: digests of what was
    read, by the flag that names it; of a model, for a new run may have overwritten an SFT folder."""
    return identity_values(config) | {f"{name} (contents)": value for name, value in contents.items()}


def agreed_identity(
    config: TrainConfig, ds_config: dict, digests: dict[str, str], tokenizer: str, models: dict[str, str], ranks: Ranks
) -> dict:
    """run_identity, once all ranks were found to agree on it and on what else decides a step. Collective.

    digests: of data and template, models: folders, by the flags that name them; tokenizer: its folder. Raises
    UserError with a rank that differs and in what: a flag, a digest, a weight, the ds_config, code, or a library.
    """
    weights = ranks.once_per_node(lambda: {name: weights_digest(folder) for name, folder in models.items()})
    identity = run_identity(config, digests | weights)
    views = ranks.gather(lambda: (socket.gethostname(), identity | environment(config, ds_config, tokenizer)))

    def compare() -> None:
        for rank, (host, theirs) in enumerate(views):
            if found := differences(views[0][1], theirs):
                raise UserError(f"rank {rank} ({host}) differs from rank 0 ({views[0][0]}) in {'; '.join(found)}")

    ranks.once(compare)  # so that it is told once
    if warning := clocks_apart(dict(ranks.gather(lambda: (socket.gethostname(), time.time())))):
        ranks.say(warning)
    return identity


def clocks_apart(clocks: dict[str, float]) -> str:
    """A warning of clocks of hosts, in seconds, read at the same time, that are CLOCKS_APART or more apart; else ""."""
    first, last = min(clocks, key=lambda host: clocks[host]), max(clocks, key=lambda host: clocks[host])
    apart = clocks[last] - clocks[first]
    what = f"the clock of {last} is {apart:.0f} s ahead of that of {first}"
    return f"warning: {what}; times in logs and files do not agree" if apart > CLOCKS_APART else ""


def environment(config: TrainConfig, ds_config: dict, tokenizer_folder: str) -> dict:
    """What has to be the same on every host besides a run's identity, by name. A path may differ from host to host."""
    fields = dataclasses.fields(config)
    view = {field.name: getattr(config, field.name) for field in fields if not field.metadata["is_path"]}
    tokenizer = sorted(path for path in Path(tokenizer_folder).iterdir() if TOKENIZER_FILE.fullmatch(path.name))
    project = Path(__file__).parents[2]
    code = [*sorted(project.glob("train_*.py")), *sorted(project.glob("common/**/*.py"))]
    for name, files in (("the tokenizer's files", tokenizer), ("this project's code", code)):
        view[name] = json_digest([(path.name, file_digest(path)) for path in files])
    view["ds_config (contents)"] = json.dumps(ds_config, sort_keys=True)
    view["python"] = platform.python_version()
    return view | {f"version of {package}": version(package) for package in PACKAGES}


def differences(ours: dict, theirs: dict) -> list[str]:
    """`name (their value, not ours)` of each that differs."""
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    return [f"{name} ({shown(str(theirs.get(name)), 60)}, not {shown(str(ours.get(name)), 60)})" for name in names]
