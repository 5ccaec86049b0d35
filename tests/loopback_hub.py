"""A small Hugging Face hub on the loopback interface, for tests of what is downloaded and uploaded by id."""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = Path(__file__).parents[1]
TOKEN = "hf_" + "plantedtoken" * 3
LARGE = (".safetensors",)  # what goes through LFS; in parts of PART bytes, one a request
PART = 1 << 16


@dataclass
class Fault:
    """What becomes of the next `times` requests `METHOD PATH` that match a pattern.

    answer: a status; "cut": the connection ends in the middle of the body, either way; "hang": it is never answered;
    "lost": it is done, and the answer does not arrive.
    """

    pattern: str
    answer: int | str
    times: int = 1
    headers: dict = field(default_factory=dict)
    body: dict = field(default_factory=dict)


class Hub:
    """Repositories of one kind, what was asked of them, and what is to go wrong.

    files: name -> commit -> path -> contents; revisions: name -> branch or tag -> commit; log: "METHOD PATH" of each
    request; messages: of the commits that arrived; role: of the token, which may write what `writable` names.
    """

    def __init__(self, kind: str = "models"):
        self.kind, self.address, self.role, self.writable = kind, "", "write", ["someone", "org"]
        self.files: dict[str, dict[str, dict[str, bytes]]] = {}
        self.revisions: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.log: list[str] = []
        self.messages: list[str] = []
        self.faults: list[Fault] = []

    def add(self, name: str, files: dict, revisions: dict, private: bool = False) -> "Hub":
        self.files[name], self.revisions[name], self.private[name] = dict(files), dict(revisions), private
        return self

    def newest(self, name: str) -> dict[str, bytes]:
        return self.files[name][self.revisions[name]["main"]]

    def commit(self, name: str, lines: list[dict]) -> str:
        """The commit that the lines of a request make; all of it or nothing."""
        files = dict(self.newest(name))
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[path] = self.objects[line["value"]["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[path]
        commit = hashlib.sha1(repr((len(self.files[name]), lines)).encode()).hexdigest()
        self.files[name][commit], self.revisions[name]["main"] = files, commit
        self.messages.append(lines[0]["value"]["summary"])
        return commit


def oid(path: str, content: bytes) -> str:
    """As the hub names a file's contents."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def handler(hub: Hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        is_lost = False

        def answer(self, body, code=200, cut=False, **headers):
            if self.is_lost:
                self.close_connection = True
                return
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for key, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        def handle_any(self):
            path = self.path.split("?")[0]
            asked = f"{self.command} {path}"
            fault = next((f for f in hub.faults if f.times and re.search(f.pattern, asked)), None)
            size, cut = int(self.headers.get("Content-Length") or 0), False
            hub.log.append(" ".join([asked, *filter(None, [self.headers.get("Range")])]))
            if fault:
                fault.times -= 1
                if isinstance(fault.answer, int):
                    self.rfile.read(size)
                    return self.answer(fault.body, fault.answer, **fault.headers)
                self.is_lost = fault.answer == "lost"
                if fault.answer == "hang" or (fault.answer == "cut" and size):
                    self.rfile.read(size // 2)
                    time.sleep(60 if fault.answer == "hang" else 0)
                    self.close_connection = True
                    return None
                cut = fault.answer == "cut"
            body = self.rfile.read(size)
            if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
                return self.answer({}, 401, X_Error_Message="Invalid credentials in Authorization header")
            if self.command in ("GET", "HEAD"):
                return self.read(path, cut)
            return self.write(path, body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def read(self, path, cut):
            if path == "/api/whoami-v2":
                if "Authorization" not in self.headers:
                    return self.answer({}, 401)
                return self.answer({"name": "someone", "auth": {"accessToken": {"role": hub.role}}})
            api, plain = f"/api/{hub.kind}/([^/]+/[^/]+)", f"/{'' if hub.kind == 'models' else hub.kind + '/'}"
            patterns = f"{api}/auth-check/write", f"{api}(?:/revision/(.+))?", f"{api}/tree/([^/]+)(/.+)?"
            auth, info, tree = (re.fullmatch(pattern, path) for pattern in patterns)
            file = re.fullmatch(f"{plain}([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            match = auth or tree or info or file
            name = match[1] if match else ""
            if name not in hub.files or hub.private[name] and "Authorization" not in self.headers:
                return self.answer({}, 404, X_Error_Code="RepoNotFound")
            if auth:
                return self.answer({}, 200 if name.split("/")[0] in hub.writable else 403)
            commit = hub.revisions[name].get(match[2] or "main", match[2])
            files = hub.files[name].get(commit)
            if files is None or file and file[3] not in files or tree and tree[3]:  # no folder has folders
                return self.answer({}, 404, X_Error_Code="RevisionNotFound" if files is None else "EntryNotFound")
            if file:
                content = files[file[3]]
                begin = int(re.match(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
                ranged = {"Content_Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
                etag = {"ETag": f'"{oid(file[3], content)}"', "X_Repo_Commit": commit}
                return self.answer(content[begin:], 206 if begin else 200, cut, **etag, **ranged)
            if tree:
                items = [{"type": "file", "path": p, "size": len(b), "oid": oid(p, b)} for p, b in files.items()]
                return self.answer(items)
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": name, "sha": commit, "private": hub.private[name], "siblings": siblings})

        def write(self, path, body):
            if path.startswith("/lfs/"):
                _, _, object_id, part = path.split("/")
                if part == "complete":
                    parts = [hub.parts.pop(item["etag"]) for item in json.loads(body)["parts"]]
                    hub.objects[object_id] = b"".join(parts)
                    is_whole = hashlib.sha256(hub.objects[object_id]).hexdigest() == object_id
                    return self.answer({}, 200 if is_whole else 400)
                hub.parts[f"{object_id}-{part}"] = body
                return self.answer({}, ETag=f"{object_id}-{part}")
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization'] or 'someone'}/{asked['name']}"
                if name.split("/")[0] not in hub.writable:
                    return self.answer({"error": "You don't have the rights to create a model there"}, 403)
                code = 409 if name in hub.files else 200
                if code == 200:
                    files = {"0" * 40: {".gitattributes": b"*.safetensors filter=lfs\n"}}
                    hub.add(name, files, {"main": "0" * 40}, asked["visibility"] == "private")
                return self.answer({"url": f"{hub.address}/{name}"}, code)
            if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                return self.answer({"objects": [self.to_upload(item) for item in json.loads(body)["objects"]]})
            match = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", path)
            name = match[1]
            if match[2] == "commit":
                commit = hub.commit(name, [json.loads(line) for line in body.splitlines()])
                return self.answer({"commitUrl": f"{hub.address}/{name}/commit/{commit}", "commitOid": commit})
            modes, there = [], hub.newest(name)
            for file in json.loads(body)["files"]:
                known = oid(file["path"], there[file["path"]]) if file["path"] in there else None
                mode = "lfs" if file["path"].endswith(LARGE) else "regular"
                modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
            return self.answer({"files": modes})

        def to_upload(self, item):
            if item["oid"] in hub.objects:
                return item
            address = f"{hub.address}/lfs/{item['oid']}"
            parts = {f"{i + 1:05d}": f"{address}/{i}" for i in range(-(-item["size"] // PART))}
            upload = {"href": f"{address}/complete", "header": {"chunk_size": str(PART), **parts}}
            return item | {"actions": {"upload": upload}}

    return Handler


@contextlib.contextmanager
def serving(hub: Hub):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def environment(hub: Hub, home: Path, **changes) -> dict:
    """Of a process that knows no other hub, and has the token."""
    own = {"HF_HOME": str(home), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPO)}
    return os.environ | own | changes


ASKING = """
import json, sys, time
waits, time.sleep = [], lambda seconds: waits.append(seconds)
from common.failures import UserError
answers = []
for question in json.loads(sys.argv[1]):
    try:
        answers.append(answer(question))
    except UserError as error:
        answers.append(str(error))
print(json.dumps([answers, waits]))
"""


def ask(script: str, questions: list, hub: Hub, home: Path, **changes) -> tuple[list, list[float]]:
    """What `answer(question)` of the script gives for each, the text of a UserError in its place, and the seconds that
    were to be waited, which are not; in a process of its own, for huggingface_hub reads its environment at import."""
    words = [sys.executable, "-c", script + ASKING, json.dumps(questions)]
    done = subprocess.run(words, env=environment(hub, home, **changes), text=True, capture_output=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))
