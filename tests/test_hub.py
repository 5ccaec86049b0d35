"""Models and tokenizers by hub id, from a hub on the loopback interface: pytest tests/test_hub.py"""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import models
import pytest

COMMITS = {"main": "ab" * 20, "v1": "cd" * 20}
NOT_NEEDED = {"pytorch_model.bin": b"a pickle", "README.md": b"words", "consolidated.00.pth": b"a pickle"}


def hub_of(contents: dict[str, dict[str, bytes]]) -> type[BaseHTTPRequestHandler]:
    """The few routes that snapshot_download asks for, of the one model org/model. contents: commit -> file -> bytes."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, body: bytes, code=200, **headers):
            self.send_response(code)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            info = re.fullmatch("/api/models/org/model(?:/revision/([^/]+))?", path)
            tree = re.fullmatch("/api/models/org/model/tree/([^/]+)", path)
            file = re.fullmatch("/org/model/resolve/([^/]+)/(.+)", path)
            asked = next((m[1] or "main" for m in (info, tree, file) if m), None)
            commit = COMMITS.get(asked, asked)
            if commit not in contents or file and file[2] not in contents[commit]:
                is_model = "org/model" in path
                self.answer(
                    b"{}",
                    404,
                    X_Error_Code=("EntryNotFound" if file else "RevisionNotFound") if is_model else "RepoNotFound",
                )
            elif file:
                self.answer(contents[commit][file[2]], ETag=f'"{commit}{file[2]}"', X_Repo_Commit=commit)
            elif tree:
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in contents[commit].items()
                ]
                self.answer(json.dumps(entries).encode(), Content_Type="application/json")
            else:
                siblings = [{"rfilename": name} for name in contents[commit]]
                answer = {"id": "org/model", "sha": commit, "siblings": siblings}
                self.answer(json.dumps(answer).encode(), Content_Type="application/json")

        do_HEAD = do_GET

    return Hub


ASK = """
import json, sys
from common import model
from common.failures import UserError
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        answers.append(model.find_model(name, revision))
    except UserError as error:
        answers.append([str(error)])
print(json.dumps(answers))
"""


@pytest.fixture
def ask(tmp_path):
    """ask([name, revision], ...) -> what find_model gives for each, its error in a list; in a process of its own, as
    huggingface_hub reads its environment when it is imported."""
    contents = {}
    for seed, commit in enumerate(COMMITS.values()):
        folder = models.make_model(tmp_path / commit, seed=seed)
        contents[commit] = {path.name: path.read_bytes() for path in folder.iterdir()} | NOT_NEEDED
        contents[commit]["merges.txt"] = b"#version: 0.2\n"
    server = ThreadingHTTPServer(("127.0.0.1", 0), hub_of(contents))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*questions, offline=False):
        environment = {
            **os.environ,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(questions)],
            env=environment,
            text=True,
            capture_output=True,
            cwd=Path(__file__).parents[1],
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    ask.contents = contents
    yield ask
    server.shutdown()


def test_a_model_comes_whole_from_the_revision_asked_for_and_what_is_not_there_is_one_line(ask):
    """Without pickles; what was downloaded before needs no hub."""
    absent = [["org/none", None], ["org/model", "v2"], ["no/such/model", None]]
    newest, tagged, *messages = ask(["org/model", None], ["org/model", "v1"], *absent)
    for folder, commit in ((newest, COMMITS["main"]), (tagged, COMMITS["v1"])):
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        assert files == {name: data for name, data in ask.contents[commit].items() if name not in NOT_NEEDED}
    again, *offline = ask(["org/model", None], *absent, offline=True)
    assert again == newest
    for (name, _), [message] in zip(absent * 2, messages + offline, strict=True):
        assert name in message and "\n" not in message
