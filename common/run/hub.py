"""The hub: whose repository a run's model goes to, and the upload.

huggingface_hub does all transfer. It finds its token in its own places, sends failed requests again, leaves out what
the hub has already, and shows progress.
"""

import json
import re
import shlex
import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import enable_progress_bars

from common.config import TrainConfig, as_words
from common.failures import UserError, as_user_error, one_line
from common.files import INDEX, json_digest, weight_files
from common.run.curves import read_run_config

RECORD, CARD = "run_config.json", "README.md"
# What goes up beside the weights; run_config.json tells whose model it is.
FILES = [INDEX, RECORD, CARD, "config.json", "generation_config.json", "curves.png", "chat_template.jinja"]
FILES += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "*processor_config.json"]
LOADED = re.compile(r".*\.(safetensors|bin|json|jinja|model)")  # what a loader may take for a part of the model
FLAGS = ("hub_model_id", "hub_private", "hub_overwrite")  # that `bash run.sh push` takes from run_config.json
COMMIT_RETRIES = (5, 30)  # seconds before each


def read_record(folder: str) -> dict:
    """run_config.json of a finished run. Raises UserError where there is none."""
    if "result" not in (record := read_run_config(folder)):
        raise UserError(f"{folder} holds no finished run")
    return record


def without_folders(text: str, record: str) -> str:
    """The text without the folders of local files: of a path that is absolute, or begins with `../`, the last component
    is left. record: run_config.json as it is written, or a part of it: its texts that begin so are the paths."""
    paths = re.findall(r'"((?:/|\.\./)(?:[^"\\]|\\.)*)"', record)
    folders = {path.rstrip("/").rpartition("/")[0] + "/" for path in paths} - {"/"}
    for folder in sorted(folders, key=len, reverse=True):
        for spelled in (folder, json.loads(f'"{folder}"')):  # in JSON, and elsewhere
            text = re.sub(rf"(?<![\w.~/-]){re.escape(spelled)}", "", text)
    return text


def require_write_token(api: HfApi) -> dict:
    """The account that the token here belongs to. Raises ValueError for one that may only read, and the client's own
    error where there is none or the hub does not answer."""
    account = api.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError("the token may only read the hub; run `hf auth login` with one that may write")
    return account


def require_repository(config: TrainConfig, identity: dict) -> str:
    """The ENTITY/NAME that the model goes to, made if need be. Raises UserError if the token may not write there, if it
    holds another model without --hub_overwrite, or if it is public without --hub_private false."""
    api, repo = HfApi(), config.hub_model_id or Path(config.output_dir).resolve().name
    with as_user_error(f"--hub_model_id {repo}"):
        account = require_write_token(api)
        repo = repo if "/" in repo else f"{account['name']}/{repo}"
        api.create_repo(repo, private=config.hub_private, exist_ok=True)
        api.auth_check(repo, write=True)
        info = api.model_info(repo)
        if config.hub_private and not info.private:
            raise ValueError(f"{repo} is public there; name another, or allow it with --hub_private false")
        names = [file.rfilename for file in info.siblings or []]
        if not config.hub_overwrite and any(LOADED.fullmatch(name) for name in names):
            text = Path(api.hf_hub_download(repo, RECORD)).read_text(encoding="utf-8") if RECORD in names else "{}"
            ours = json.dumps(identity, default=str)
            if json.loads(text).get("identity") != json.loads(without_folders(ours, ours)):
                raise ValueError(f"{repo} holds another model; name another, or replace it with --hub_overwrite true")
    return repo


def upload(config: TrainConfig) -> str:
    """The address of the commit by which the repository has the files of output_dir's model, and no others that a
    loader reads. Raises UserError: no finished run, a repository that may not be written, an upload that failed."""
    folder, api, record = Path(config.output_dir), HfApi(), read_record(config.output_dir)
    repo = require_repository(config, record["identity"])
    run, what = json_digest(record["identity"])[:12], f"{record['method']}, {record['result']['steps']} steps"
    message = f"{folder.resolve().name}: {what}, run {run}"
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()  # whoever loads the model tells transformers to show none, which holds for the hub's too
    with as_user_error(f"the upload to {repo} failed"):
        names = {path.name for pattern in FILES for path in folder.glob(pattern)}
        names |= {*weight_files(folder)}
        read = {name: (folder / name).read_text(encoding="utf-8") for name in (RECORD, CARD) if name in names}
        texts = {name: without_folders(text, read[RECORD]).encode() for name, text in read.items()}
        if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
            raise ValueError(f"{missing[0]} is missing")

        def commit() -> str:
            stale = {*filter(LOADED.fullmatch, api.list_repo_files(repo))} - names
            operations: list = [CommitOperationAdd(name, texts.get(name, folder / name)) for name in sorted(names)]
            operations += map(CommitOperationDelete, sorted(stale))
            return api.create_commit(repo, operations, commit_message=message).commit_url

        for seconds in COMMIT_RETRIES:
            try:
                return commit()
            except Exception as e:  # a commit is the one request that the client does not send again
                if isinstance(e, HfHubHTTPError) and e.response.status_code < 500 and e.response.status_code != 429:
                    raise
            time.sleep(seconds)
        return commit()


def push(config: TrainConfig) -> str:
    """The end of a run, whatever becomes of its upload, in a line: where the model is, or what sends it there."""
    try:
        return f"uploaded: {upload(config)}"
    except Exception as e:
        saved, asked = read_record(config.output_dir)["config"], vars(config)
        changed = as_words({name: asked[name] for name in FLAGS if name in saved and saved[name] != asked[name]})
        command = shlex.join(["bash", "run.sh", "push", config.output_dir, *changed])
        return f"{one_line(e)}; {config.output_dir} holds the model; to upload it: {command}"
