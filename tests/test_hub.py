"""Models and data from the hub, a model to it, by huggingface_hub's client and a hub on loopback: tests/test_hub.py"""

import dataclasses
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import launch
import loopback_hub
import models
import numpy as np
import pytest
import yaml
from hypothesis import given as drawn
from hypothesis import strategies as st
from loopback_hub import TOKEN, Fault, Hub

from common.config import SFTConfig, parse_config
from common.run import card
from common.run.hub import without_folders

NEWEST, TAGGED = "ab" * 20, "cd" * 20
REVISIONS = {"main": NEWEST, "v1": TAGGED}
NOT_NEEDED = {"pytorch_model.bin": b"a pickle", "consolidated.00.pth": b"a pickle", "original/params.json": b"{}"}
NOT_NEEDED |= {"consolidated.safetensors": b"a twin", "original/tokenizer.model": b"a twin"}


# ------------------------------------------------------------------ what comes in

FIND = """
import errno, os
from huggingface_hub import file_download
from common.failures import explained
from common.model.load import find_model
def full(*_, **__): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def answer(question):
    name, revision, token = question
    os.environ["HF_TOKEN"] = token
    if name == "org/full":
        file_download.http_get = full
    try: return find_model(name, revision)
    except OSError as e: return [explained(e).EXIT_CODE, str(explained(e))]
"""
WEIGHTS = "resolve/.*/model.safetensors"
GATED = {"X-Error-Code": "GatedRepo"}
DISTURBED_DOWNLOADS = {
    "org/cut": Fault(f"GET /org/cut/{WEIGHTS}", "cut"),
    "org/busy": Fault(f"GET /org/busy/{WEIGHTS}", 429, headers={"Retry-After": "7"}),
    "org/down": Fault(f"GET /org/down/{WEIGHTS}", 500),
}
KEPT = {
    # the name, revision and token asked with, and what the line names
    "org/none": (None, TOKEN, "Not Found"),
    "org/model": ("v2", TOKEN, "v2"),
    "no/such/model": (None, TOKEN, "no/such/model"),
    "org/secret": (None, "", "Not Found"),
    "org/wrong": (None, "hf_wrong", "hf auth login"),
    "org/gated": (None, TOKEN, "gated"),
}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """What models were asked for, in order, and what was given; the files of the hub's commits; the waits."""
    files, home, hub = {}, tmp_path_factory.mktemp("home"), Hub()
    for seed, commit in enumerate((NEWEST, TAGGED)):
        folder = models.make_model(tmp_path_factory.mktemp("model"), seed=seed)
        files[commit] = {path.name: path.read_bytes() for path in folder.iterdir()} | NOT_NEEDED
        files[commit] |= {"merges.txt": b"#version: 0.2\n", "README.md": b"---\nlicense: llama3.1\n---\n"}
    for name in ("org/model", "org/secret", "org/wrong", "org/gated", "org/full", *DISTURBED_DOWNLOADS):
        hub.add(name, files, REVISIONS, private=name == "org/secret")
    hub.files["org/cut"] = {NEWEST: {"model.safetensors": random.Random(0).randbytes(21 << 20)}}  # chunks: 10 MB
    hub.faults = [Fault("/org/gated", 403, 99, GATED), *map(dataclasses.replace, DISTURBED_DOWNLOADS.values())]
    asked = [["org/model", None, TOKEN], ["org/model", "v1", TOKEN]]
    asked += [[name, None, TOKEN] for name in (*DISTURBED_DOWNLOADS, "org/down")]
    asked += [[name, *question[:2]] for name, question in KEPT.items()] + [["org/full", None, TOKEN]]
    with loopback_hub.serving(hub):
        given, waits = loopback_hub.ask(FIND, asked, hub, home)
        again = [asked[0], ["org/none", None, TOKEN]]
        offline, _ = loopback_hub.ask(FIND, again, hub, home, HF_HUB_OFFLINE="1")
    unreachable, _ = loopback_hub.ask(FIND, again, hub, home)
    assert not any(fault.times for fault in hub.faults[1:])
    return files, given, waits, offline, unreachable, hub


def test_a_model_comes_whole_without_twins_from_the_revision_asked_for_and_once_it_is_here_needs_no_hub(downloads):
    files, (newest, tagged, *_), _, *later, _ = downloads
    for folder, commit in ((newest, NEWEST), (tagged, TAGGED)):
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        assert found == {name: data for name, data in files[commit].items() if name not in NOT_NEEDED}
    for cached, absent in later:
        assert cached == newest and "org/none" in absent and "\n" not in absent


def test_a_download_that_is_disturbed_comes_whole(downloads):
    """The client does not try again after a status of 500: the next command does."""
    _, (_, _, cut, busy, down, down_again, *_), waits, _, _, hub = downloads
    for name, folder in (("org/cut", cut), ("org/busy", busy), ("org/down", down_again)):
        assert (Path(folder) / "model.safetensors").read_bytes() == hub.newest(name)["model.safetensors"]
    assert f"GET /org/cut/resolve/{NEWEST}/model.safetensors bytes={10 << 20}-" in hub.log
    assert 8 in waits and "500" in down and "org/down" in down and "\n" not in down


def test_a_model_that_the_hub_does_not_give_is_one_line_and_a_full_disk_no_mistake(downloads):
    *messages, (code, full) = downloads[1][6:]
    for (name, (_, _, named)), message in zip(KEPT.items(), messages, strict=True):
        assert name in message and named in message and "\n" not in message
    assert code == 3 and "No space left" in full


ROWS = [{"messages": [{"role": "user", "content": f"ü{i}"}], "other": i} for i in range(20)]
ASK_ROWS = """
from common.data.sources import load_source, parse_source
def answer(question):
    rows = load_source(parse_source(question))
    known_by = {name: rows.identity[name] for name in ("revision", "split")}
    return [known_by, rows.indices.tolist(), rows.read(rows.indices)]
"""


def test_rows_come_from_the_commit_that_is_recorded(tmp_path):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    files = {NEWEST: {"train.jsonl": b"".join(lines)}, TAGGED: {"train.jsonl": lines[0]}}
    questions = ["org/data@v1", "org/data=25%", "org/data@main:train", "org/data:test", "org/none"]
    with loopback_hub.serving(Hub("datasets").add("org/data", files, REVISIONS)) as hub:
        (tagged, part, whole, no_split, no_such), _ = loopback_hub.ask(ASK_ROWS, questions, hub, tmp_path)
        again = [f"org/data@{NEWEST}=3", f"org/data@{TAGGED}", "org/data"]
        (pinned, other, by_name), _ = loopback_hub.ask(ASK_ROWS, again, hub, tmp_path, HF_HUB_OFFLINE="1")
    indices = np.random.RandomState(42).choice(20, size=5, replace=False).tolist()
    messages = [{"messages": ROWS[i]["messages"]} for i in indices]
    assert part == [{"revision": NEWEST, "split": "train"}, indices, messages]
    assert whole[0] == part[0] and whole[1] == list(range(20))
    assert tagged == [{"revision": TAGGED, "split": "train"}, [0], [{"messages": ROWS[0]["messages"]}]]
    assert "org/data:test" in no_split and "['train']" in no_split
    assert "org/none" in no_such and "\n" not in no_such
    assert pinned[0] == part[0]
    assert f"not commit {TAGGED}" in other  # `datasets` gives the commit that it cached last
    assert f"org/data@{NEWEST}" in by_name and f"org/data@{TAGGED}" in by_name and "\n" not in by_name


def test_a_config_is_named_after_the_set_and_one_that_is_missing_with_the_others(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("fr", "en-v1.0"))
    files = {f"{name}.jsonl": json.dumps({"text": name}).encode() + b"\n" for name in ("fr", "en-v1.0")}
    files["README.md"] = f"---\nconfigs:\n{configs}---\n".encode()
    questions = ["org/data/fr", "org/data/en-v1.0@v1:train=100%", "org/data", "org/data/de"]
    with loopback_hub.serving(Hub("datasets").add("org/data", {NEWEST: files, TAGGED: files}, REVISIONS)) as hub:
        (first, second, none, other), _ = loopback_hub.ask(ASK_ROWS, questions, hub, tmp_path)
        (pinned,), _ = loopback_hub.ask(ASK_ROWS, [f"org/data/fr@{NEWEST}"], hub, tmp_path, HF_HUB_OFFLINE="1")
    assert first == pinned == [{"revision": NEWEST, "split": "train"}, [0], [{"text": "fr"}]]
    assert second == [{"revision": TAGGED, "split": "train"}, [0], [{"text": "en-v1.0"}]]
    for message in (none, other):
        assert "fr" in message and "en-v1.0" in message and "\n" not in message


# ------------------------------------------------------------------ what goes out

UPLOAD = """
import dataclasses
from common.config import TrainConfig
from common.run import hub
def answer(question): return hub.upload(dataclasses.replace(TrainConfig(), **question))
"""


@pytest.fixture
def finished(tmp_path) -> tuple[Path, dict[str, bytes]]:
    """The folder of a finished run, named `my-run`, and those of its files that are the model's."""
    draw, folder = random.Random(0), tmp_path / "runs" / "my-run"
    shards = {f"model-0000{i}-of-00002.safetensors": draw.randbytes(150_000) for i in (1, 2)}
    index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(shards)}}
    record = {"method": "SFT", "identity": {"seed": 42}, "config": {}, "result": {"steps": 7}}
    texts = {"model.safetensors.index.json": json.dumps(index), "run_config.json": json.dumps(record)}
    texts |= {"README.md": "---\ntags: [sft]\n---\n", "config.json": "{}", "generation_config.json": "{}"}
    texts |= {"tokenizer.json": '"ü"', "tokenizer_config.json": "{ }", "chat_template.jinja": "{{ messages }}"}
    files = shards | {name: text.encode() for name, text in texts.items()} | {"curves.png": draw.randbytes(900)}
    others = ("metrics.jsonl", ".lock", "model-mine.safetensors", "sanity.json", "train.log", ".export/config.json")
    others += ("checkpoints/step_00000007/state.json", "checkpoints/step_00000007/model-00001-of-00002.safetensors")
    for name, content in (files | dict.fromkeys(others, b"not the model's")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder, files


def arrived(hub: Hub, name: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.newest(name).items() if path != ".gitattributes"}


CONFLICT = {"error": "Cannot create repo: another conflicting operation is in progress"}
DISTURBED = {
    "nothing": ([], []),
    "429 with Retry-After": ([Fault("/preupload/", 429, headers={"Retry-After": "7"})], [8]),
    "500, then 200": ([Fault("/preupload/", 500), Fault("/objects/batch", 500), Fault("PUT /lfs/.*/1$", 503)], []),
    "cut in a part": ([Fault("PUT /lfs/.*/1$", "cut")], []),
    "cut in the commit": ([Fault("/commit/", "cut")], [5]),
    "the commit's answer is lost": ([Fault("/commit/", "lost")], [5]),
    "the hub is down at the commit": ([Fault("/commit/", 502, times=2)], [5, 30]),
    "409: it is being made": ([Fault("/repos/create", 409, body=CONFLICT)], []),
}


@pytest.mark.parametrize("case", DISTURBED)
def test_what_arrives_is_the_model_byte_for_byte_in_one_commit_that_names_the_run(tmp_path, finished, case):
    faults, expected_waits = DISTURBED[case]
    folder, files = finished
    with loopback_hub.serving(Hub()) as hub:
        hub.faults = [dataclasses.replace(fault) for fault in faults]
        (address,), waits = loopback_hub.ask(UPLOAD, [{"output_dir": str(folder)}], hub, tmp_path / "home")
    assert arrived(hub, "someone/my-run") == files
    assert address.endswith(hub.revisions["someone/my-run"]["main"]) and hub.private["someone/my-run"]
    assert len(hub.messages) == 1 and "my-run: SFT, 7 steps" in hub.messages[0]
    assert not any(fault.times for fault in hub.faults) and set(expected_waits) <= {*waits}


OTHER_RUN = {"run_config.json": json.dumps({"identity": {"seed": 43}}).encode(), "model.safetensors": b"another's"}
REFUSED = {
    # what there is at the hub, changes of the flags and of the environment, and what the line names
    "no token": ({}, {}, {"HF_TOKEN": ""}, "hf auth login"),
    "a wrong token": ({}, {}, {"HF_TOKEN": "hf_wrong"}, "HF_TOKEN"),
    "a token that may only read": ({"role": "read"}, {}, {}, "may write"),
    "another's account": ({}, {"hub_model_id": "nobody/m"}, {}, "rights to create"),
    "another's repository": ({"files": {"nobody/m": {}}}, {"hub_model_id": "nobody/m"}, {}, "rights|Forbidden"),
    "three names": ({}, {"hub_model_id": "org/org/m"}, {}, "org/org/m"),
    "another run's model": ({"files": {"org/m": OTHER_RUN}}, {"hub_model_id": "org/m"}, {}, "--hub_overwrite true"),
    "a model of no run": ({"files": {"org/m": {"model.safetensors": b""}}}, {"hub_model_id": "org/m"}, {}, "another"),
    "a public repository": ({"files": {"org/m": {}}, "public": True}, {"hub_model_id": "org/m"}, {}, "--hub_private"),
    "offline": ({}, {}, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    "no hub": ({}, {}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_repository_that_may_not_be_written_is_refused_before_anything_is_sent(tmp_path, finished, case):
    there, flags, changes, named = REFUSED[case]
    with loopback_hub.serving(Hub()) as hub:
        hub.role = there.get("role", "write")
        for name, files in there.get("files", {}).items():
            hub.add(name, {NEWEST: files}, REVISIONS, private="public" not in there)
        given = {"output_dir": str(finished[0]), **flags}
        (message,), _ = loopback_hub.ask(UPLOAD, [given], hub, tmp_path / "home", **changes)
    assert any(text in message for text in named.split("|")) and "\n" not in message
    assert hub.messages == [] and not any("/lfs/" in request for request in hub.log)


def test_a_run_may_push_again_and_with_hub_overwrite_over_another_model_of_which_nothing_is_loaded(tmp_path, finished):
    folder, files = finished
    stale = OTHER_RUN | {"model-00003-of-00003.safetensors": b"", "added_tokens.json": b"{}", "pytorch_model.bin": b""}
    with loopback_hub.serving(Hub()) as hub:
        hub.add("org/m", {NEWEST: stale | {"LICENSE": b"kept"}}, REVISIONS, private=False)
        public = {"output_dir": str(folder), "hub_model_id": "org/m", "hub_private": False}
        loopback_hub.ask(UPLOAD, [public | {"hub_overwrite": True}, public], hub, tmp_path / "home")
        assert arrived(hub, "org/m") == files | {"LICENSE": b"kept"} and len(hub.messages) == 1
        (folder / "README.md").write_text("mended")
        loopback_hub.ask(UPLOAD, [public], hub, tmp_path / "home")
    assert hub.newest("org/m")["README.md"] == b"mended" and len(hub.messages) == 2


FOLDERS = ["/home/", "/home/ü b/it's/", "../../a b/", "/"]


@drawn(st.lists(st.tuples(st.sampled_from(FOLDERS), st.sampled_from(["x.jsonl=10%", "sft", "m/"])), min_size=1))
def test_what_is_uploaded_names_files_of_this_machine_without_their_folders(paths):
    """And a second time changes nothing; names at the hub and addresses stay, in run_config.json and in other texts."""
    kept = ["org/home/x", "https://host/home/x", "output/sft", "data/home"]
    record = json.dumps({"config": [folder + name for folder, name in paths] + kept, "left": {paths[0][0] + "f": 1}})
    cut = without_folders(record, record)
    expected = [name if folder != "/" else folder + name for folder, name in paths]
    assert json.loads(cut)["config"] == expected + kept
    assert without_folders(cut, cut) == cut
    card = "\n".join([f"| {folder}{name} |" for folder, name in paths] + kept)
    assert without_folders(card, record) == "\n".join([f"| {name} |" for name in expected] + kept)


def push(hub: Hub, home: Path, folder: str | Path, *flags: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "common.verbs", "push", str(folder), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": launch.REPO}
    return subprocess.Popen(words, env=loopback_hub.environment(hub, home), **pipes)


def test_an_upload_that_is_killed_is_whole_after_the_next_and_what_was_there_is_not_sent_again(tmp_path, finished):
    folder, files = finished
    with loopback_hub.serving(Hub()) as hub:
        hub.faults = [Fault("PUT /lfs/.*/1$", "hang")]
        with push(hub, tmp_path, folder) as process:
            while not (hub.objects and not hub.faults[0].times):  # one shard is there, the other hangs
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
        assert arrived(hub, "someone/my-run") == {} and len(hub.objects) == 1
        hub.log.clear()
        with push(hub, tmp_path, folder) as process:
            output = process.communicate()[0]
    assert process.returncode == 0 and f"uploaded: {hub.address}/someone/my-run/commit/" in output
    assert arrived(hub, "someone/my-run") == files and len(hub.messages) == 1
    assert sum("PUT /lfs/" in request for request in hub.log) == 3  # the parts of one shard


def test_the_command_that_retries_an_upload_names_what_the_run_was_not_asked_for(tmp_path, finished):
    folder, _ = finished
    record = json.loads((folder / "run_config.json").read_text())
    record["config"] = {"hub_model_id": None, "hub_private": False, "hub_overwrite": False}
    (folder / "run_config.json").write_text(json.dumps(record))
    given = {"output_dir": str(folder), "hub_model_id": "org/m"}
    with loopback_hub.serving(Hub()) as hub:
        hub.faults = [Fault("/repos/create", 403)]
        (line,), _ = loopback_hub.ask(UPLOAD.replace("hub.upload", "hub.push"), [given], hub, tmp_path / "home")
        words = shlex.split(line.partition("bash run.sh push ")[2])
        with push(hub, tmp_path / "home", *words) as process:
            assert process.wait() == 0
    assert words == [str(folder), "--hub_model_id=org/m", "--hub_private=True"] and hub.private == {"org/m": True}


@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "run_config.json"])
def test_a_folder_without_a_whole_model_is_not_pushed(tmp_path, finished, lost):
    path = finished[0] / lost
    path.write_text('{"identity": {}}') if path.suffix == ".json" else path.unlink()
    with loopback_hub.serving(Hub()) as hub, push(hub, tmp_path, finished[0]) as process:
        output = process.communicate()[0]
    assert process.returncode == 2 and output.startswith("error: ") and output.count("\n") == 1
    assert hub.messages == []


# ------------------------------------------------------------------ a run that pushes


def constants(hub: Hub, home: Path) -> dict:
    """What huggingface_hub reads of its environment at import, for a rank whose server imported it before; no waits."""
    names = {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    names |= {"HF_TOKEN_PATH": home / "token", "HF_HUB_CACHE": str(home / "cache")}
    names["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    retries = {"common.run.hub.COMMIT_RETRIES": (0, 0)}
    return retries | {f"huggingface_hub.constants.{name}": value for name, value in names.items()}


def test_an_upload_that_fails_costs_no_model_and_tells_nobody_the_token(tmp_path, monkeypatch, downloads, sft_data):
    """And says how to push again. The token is in a file first, then in the environment."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    hub = Hub().add("org/model", downloads[0], REVISIONS)
    given = launch.flags("org/model", sft_data, tmp_path, max_train_steps=2, push_to_hub="true", hub_model_id="org/new")
    given["hub_private"] = "false"
    with loopback_hub.serving(hub):
        hub.faults = [Fault("PUT /lfs/", 403, times=99)]
        run = launch.launch("train_sft", given, 2, constants(hub, tmp_path / "home")).succeeded()
        asked, sent = "GET /api/models/org/new/auth-check/write", "POST /api/models/org/new/preupload/main"
        assert hub.log.index(asked) < hub.log.index(sent)
        (line,) = (line for line in run.stdout.splitlines() if "bash run.sh push " in line)
        assert line.endswith(f"bash run.sh push {run.output_dir}") and arrived(hub, "org/new") == {}
        hub.faults.clear()
        (tmp_path / "home" / "token").unlink()
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        with push(hub, tmp_path / "home", run.output_dir) as process:
            output = process.communicate()[0]
        assert process.returncode == 0 and f"uploaded: {hub.address}/org/new/commit/" in output
        again = launch.launch("train_sft", given, 2, constants(hub, tmp_path / "home")).succeeded()
        assert f"uploaded: {hub.address}/org/new" in again.stdout and "loading " not in again.stdout
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names |= {"model.safetensors", "README.md", "run_config.json"}
    assert len(hub.messages) == 1 and not hub.private["org/new"]
    here, there = {name: (run.output_dir / name).read_bytes() for name in names}, arrived(hub, "org/new")
    assert there.keys() == names
    assert {name for name in names if there[name] != here[name]} == {"README.md", "run_config.json"}
    assert not [name for name in there if str(tmp_path.parent).encode() in there[name]], "paths of this machine"
    texts = [json.dumps(json.loads(there["run_config.json"])[name]) for name in ("config", "data")]
    assert all(f'"{sft_data.name}"' in text for text in texts)
    assert b"without their folders" in there["README.md"] and sft_data.name.encode() in there["README.md"]
    front = yaml.safe_load((run.output_dir / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == "org/model" and front["license"] == "llama3.1" and front["tags"][0] == "sft"
    assert json.loads((run.output_dir / "run_config.json").read_text())["base"]["commit"] == NEWEST
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "token"]
    everything += [text.encode() for text in (run.stdout, run.stderr, again.stdout, again.stderr, output)]
    assert len(everything) > 20 and not any(TOKEN.encode() in content for content in everything)


def test_a_run_is_refused_before_its_model_loads(tmp_path, monkeypatch, tiny_llama, sft_data):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    given = launch.flags(tiny_llama, sft_data, tmp_path, push_to_hub="true", hub_model_id="nobody/new")
    with loopback_hub.serving(Hub()) as hub:
        run = launch.launch("train_sft", given, 2, constants(hub, tmp_path / "home"))
    assert "--hub_model_id nobody/new" in run.refused(2) and "loading " not in run.stdout


# ------------------------------------------------------------------ the model card


def card_of(folder: Path, base: dict, **flags) -> tuple[dict, str]:
    """A card's front matter and its text, of a run on one source from the hub and one local file."""
    config = dataclasses.replace(parse_config(SFTConfig, []), output_dir=str(folder), **flags)
    source = {"asked_for": "org/data@v1:train=25%", "path": "org/data", "revision": NEWEST, "split": "train"}
    record = {"method": "SFT", "base": base, "data": {"sources": [source, {"asked_for": "a.jsonl", "path": "a.jsonl"}]}}
    record |= {"num_steps": 9, "versions": {"torch": "2"}, "world_size": 4, "planned": {"hours": 1.5}}
    record |= {"micro_batch_budget": 16384, "residency": "all", "kernel": "varlen", "layers": {"recomputed": 4}}
    record |= {"device": {"name": "GPU", "total_memory_gb": 80.0}}
    record |= {"result": {"steps": 7, "total_tokens": 70, "target_tokens": 30}}
    models.make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 300]}')
    text = card.model_card(config, record, {"train_loss": 0.25}, "org/data  5 rows")
    return yaml.safe_load(text.split("---\n")[1]), text


def test_a_card_tells_the_hub_its_base_data_and_license_and_a_reader_how_to_talk_to_it_and_repeat_it(tmp_path):
    mixer = ["org/data@v1:train=25%", "a.jsonl"]
    base = {"commit": TAGGED, "license": "other", "license_name": "own", "base_model": "not/this"}
    front, text = card_of(tmp_path, base, model_name_or_path="org/base", dataset_mixer=mixer, learning_rate=3e-6)
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "other"}
    expected |= {"base_model": "org/base", "datasets": ["org/data"], "tags": ["sft", "conversational"]}
    assert front == expected | {"license_name": "own"}
    command = next(line for line in text.splitlines() if line.startswith("bash run.sh sft 4 "))
    repeated = parse_config(SFTConfig, command.split()[4:])
    assert repeated.dataset_mixer == [f"org/data@{NEWEST}:train=25%", "a.jsonl"]
    assert (repeated.model_revision, repeated.learning_rate, repeated.seed) == (TAGGED, 3e-6, 42)
    told = ["`<eos>` (0), token (300)", "--chat_template auto", "| train_loss | 0.25 |", "7 of 9"]
    told += ["| micro_batch_budget | 16384 |", "4 x GPU (80 GB", "org/data  5 rows", "| planned hours | 1.5 |"]
    assert [part for part in told if part not in text] == []


def test_a_model_trained_from_a_folder_names_what_that_was_trained_from(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\n")
    base = card.base_of(str(tmp_path / "sft"))
    front, _ = card_of(tmp_path, base)
    assert (front["base_model"], front["license"]) == ("org/base", "mit")
    for readme in ("---\nlicense: [\n---\n", "no front matter", "---\n- a list\n---\n"):
        (tmp_path / "sft" / "README.md").write_text(readme)
        assert card.base_of(str(tmp_path / "sft")) == {"commit": None}
