"""A Hugging Face hub of one repository on the loopback interface, for tests of what is downloaded by id."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REPO = Path(__file__).parents[1]


@contextlib.contextmanager
def serving(kind: str, name: str, files: dict[str, dict[str, bytes]], revisions: dict[str, str]):
    """The few routes that huggingface_hub and `datasets` ask for. Gives the hub's address.

    kind: "models" or "datasets"; files: commit -> path -> contents; revisions: name -> commit."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, body, code=200, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for key, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            info = re.fullmatch(f"/api/{kind}/{name}(?:/revision/(.+))?", path)
            tree = re.fullmatch(f"/api/{kind}/{name}/tree/([^/]+)", path)
            file = re.fullmatch(f"/{'' if kind == 'models' else kind + '/'}{name}/resolve/([^/]+)/(.+)", path)
            asked = next((match[1] or "main" for match in (info, tree, file) if match), None)
            commit = revisions.get(asked, asked)
            if commit not in files or file and file[2] not in files[commit]:
                reason = "RepoNotFound" if name not in path else "RevisionNotFound" if info or tree else "EntryNotFound"
                self.answer({}, 404, X_Error_Code=reason)
            elif file:
                self.answer(files[commit][file[2]], ETag=f'"{commit}{file[2]}"', X_Repo_Commit=commit)
            elif tree:
                self.answer(
                    [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files[commit].items()]
                )
            else:
                self.answer({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files[commit]]})

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def answers(script: str, questions: list, hub: str, cache: Path, offline: bool = False) -> list:
    """What `answer(question)` of the script gives for each, the text of a UserError in its place; in a process of its
    own, for huggingface_hub reads its environment when it is imported."""
    asking = """
import json, sys
from common.failures import UserError
answers = []
for question in json.loads(sys.argv[1]):
    try:
        answers.append(answer(question))
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
    environment = {"HF_HOME": str(cache), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", script + asking, json.dumps(questions)],
        env={**os.environ, **environment, "HF_HUB_DISABLE_TELEMETRY": "1"},
        text=True,
        capture_output=True,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
