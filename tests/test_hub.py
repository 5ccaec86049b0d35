"""Models, tokenizers and data by hub id, from a hub on the loopback interface: pytest tests/test_hub.py"""

import json
from pathlib import Path

import loopback_hub
import models
import numpy as np

NEWEST, TAGGED = "ab" * 20, "cd" * 20
REVISIONS = {"main": NEWEST, "v1": TAGGED}
NOT_NEEDED = {"pytorch_model.bin": b"a pickle", "README.md": b"words", "consolidated.00.pth": b"a pickle"}


def test_a_model_comes_whole_from_the_revision_asked_for_and_what_is_not_there_is_one_line(tmp_path):
    """Without pickles; what was downloaded before needs no hub."""
    files = {}
    for seed, commit in enumerate((NEWEST, TAGGED)):
        folder = models.make_model(tmp_path / commit, seed=seed)
        files[commit] = {path.name: path.read_bytes() for path in folder.iterdir()} | NOT_NEEDED
        files[commit]["merges.txt"] = b"#version: 0.2\n"
    script = "from common.model.load import find_model\ndef answer(question): return find_model(*question)"
    absent = [["org/none", None], ["org/model", "v2"], ["no/such/model", None]]
    with loopback_hub.serving("models", "org/model", files, REVISIONS) as hub:
        questions = [["org/model", None], ["org/model", "v1"], *absent]
        newest, tagged, *messages = loopback_hub.answers(script, questions, hub, tmp_path / "cache")
        again, *offline = loopback_hub.answers(
            script, [["org/model", None], *absent], hub, tmp_path / "cache", offline=True
        )
    for folder, commit in ((newest, NEWEST), (tagged, TAGGED)):
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        assert found == {name: data for name, data in files[commit].items() if name not in NOT_NEEDED}
    assert again == newest
    for (name, _), message in zip(absent * 2, messages + offline, strict=True):
        assert name in message and "\n" not in message


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
    with loopback_hub.serving("datasets", "org/data", files, REVISIONS) as hub:
        tagged, part, whole, no_split, no_such = loopback_hub.answers(ASK_ROWS, questions, hub, tmp_path)
        pinned, other, by_name = loopback_hub.answers(
            ASK_ROWS, [f"org/data@{NEWEST}=3", f"org/data@{TAGGED}", "org/data"], hub, tmp_path, offline=True
        )
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
    with loopback_hub.serving("datasets", "org/data", {NEWEST: files, TAGGED: files}, REVISIONS) as hub:
        first, second, none, other = loopback_hub.answers(ASK_ROWS, questions, hub, tmp_path)
        (pinned,) = loopback_hub.answers(ASK_ROWS, [f"org/data/fr@{NEWEST}"], hub, tmp_path, offline=True)
    assert first == pinned == [{"revision": NEWEST, "split": "train"}, [0], [{"text": "fr"}]]
    assert second == [{"revision": TAGGED, "split": "train"}, [0], [{"text": "en-v1.0"}]]
    for message in (none, other):
        assert "fr" in message and "en-v1.0" in message and "\n" not in message
