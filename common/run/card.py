"""README.md of an exported model: what the hub reads of it (the front matter), and what its reader needs."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load

from common.config import TrainConfig, as_words, identity_values

LICENSE = ("license", "license_name", "license_link")
PLAN = ("num_steps", "micro_batch_budget", "opening_budget", "residency", "kernel", "layers")  # of run_config.json


def base_of(folder: str) -> dict:
    """What is known of the model in a folder: its commit if it came from the hub, and what of its README.md's front
    matter holds for what is trained from it: the license, and the base_model of a folder that is on no hub."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/?$", folder)
    front: dict = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # none, or one that says nothing of a license
        front = metadata_load(Path(folder) / "README.md") or {}
    return {"commit": found and found[1]} | {key: front[key] for key in (*LICENSE, "base_model") if key in front}


def model_card(config: TrainConfig, record: dict, last: dict | None, table: str) -> str:
    """README.md of the model in output_dir, by run_config.json, the last record of metrics.jsonl, the data's table."""
    folder, method, base, result = Path(config.output_dir), record["method"], record["base"], record["result"]
    name, commit, device = config.model_name_or_path, base["commit"], record["device"]
    commits = {source["asked_for"]: source["revision"] for source in record["data"]["sources"] if "revision" in source}
    datasets = [source["path"] for source in record["data"]["sources"] if "revision" in source]
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "datasets": datasets}
    front |= {"base_model": name if commit else base.get("base_model"), "tags": [method.lower(), "conversational"]}
    front |= {key: base.get(key) for key in LICENSE}
    came = {"optimizer steps": f"{result['steps']} of {record['num_steps']} planned"}
    came["step of the exported model"] = record.get("exported_step", result["steps"])
    came |= {"tokens": result["total_tokens"], "target tokens": result["target_tokens"], **(last or {})}
    planned = {f"planned {name}": value for name, value in record.get("planned", {}).items()}
    curves = "![curves](curves.png)\n\n" * (folder / "curves.png").is_file()
    machine = f"{record['world_size']} x {device['name']} ({device['total_memory_gb']:.0f} GB each); "
    sections = {
        "How to talk to it": _how_to_talk(config, folder),
        "Data": f"```\n{table}\n```",
        "Result: sums, and the last step that was logged": curves + _table(came),
        "Settings": _table(identity_values(config, (True, "contents"))),
        "Plan": _table({name: record[name] for name in PLAN if name in record} | planned),
        "Machine": machine + ", ".join(f"{package} {number}" for package, number in record["versions"].items()),
        "To repeat it": f"```\n{_command(config, record, commits)}\n```\n\n"
        "On the hub this page and `run_config.json` name files of the trainer's machine without their folders.",
    }
    text = yaml.safe_dump({key: value for key, value in front.items() if value}, sort_keys=False)
    trained_from = f"{method} of `{name}`{f' at commit {commit}' if commit else ''}, full parameters, with Plaintune."
    text = f"---\n{text}---\n\n# {folder.resolve().name}\n\n{trained_from}\n"
    return text + "".join(f"\n## {title}\n\n{body}\n" for title, body in sections.items())


def _table(values: dict) -> str:
    rows = (f"\n| {name} | {' '.join(value) if isinstance(value, list) else value} |" for name, value in values.items())
    return "| name | value |\n|---|---|" + "".join(rows)


def _how_to_talk(config: TrainConfig, folder: Path) -> str:
    """Code, the template's name, and the tokens that end an answer, as generation_config.json has them."""
    ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    texts = {token["id"]: f"`{token['content']}`" for token in added}
    stops = ", ".join(f"{texts.get(i, 'token')} ({i})" for i in (ends if isinstance(ends, list) else [ends]))
    template = f"the chat template of the training (`--chat_template {config.chat_template}`)"
    pipe = f'pipe = pipeline("text-generation", "{config.hub_model_id or folder.resolve().name}")'
    talk = 'print(pipe([{"role": "user", "content": "What is a cloud?"}], max_new_tokens=200))'
    code = f"```python\nfrom transformers import pipeline\n\n{pipe}\n{talk}\n```"
    return f"{code}\n\nIts tokenizer has {template}. Answers end with {stops}."


def _command(config: TrainConfig, record: dict, commits: dict[str, str]) -> str:
    """The command that gives this result, with what came from the hub at the commits that it was read at."""
    pinned = {text: re.sub(r"^([^@:=]*)(@[^:=]+)?", rf"\g<1>@{commit}", text) for text, commit in commits.items()}
    mixer = [pinned.get(text, text) for text in config.dataset_mixer]
    words = ["bash", "run.sh", record["method"].lower(), str(record["world_size"])]
    values = identity_values(config, (True, "contents")) | {"stop_after_steps": config.stop_after_steps}
    if record["result"].get("stopped_early"):
        values["stop_after_steps"] = record["result"]["steps"]
    values |= {"model_revision": record["base"]["commit"], "dataset_mixer": mixer}
    defaults = vars(type(config)()) | {"beta": None}  # whose default is the loss's
    words += as_words({name: value for name, value in values.items() if value != defaults[name]})
    return shlex.join(words)
