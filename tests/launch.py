"""Runs the two scripts as a launcher does, N processes with a rank each, without N times ten seconds of imports.

A fork server imports the product once; each rank is a fork of it with the environment that `deepspeed` and
`torchrun` set. `launch_for_real` goes through a real launcher, for the few tests that are about it.
"""

import atexit
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

REPO = Path(__file__).resolve().parent.parent
CPU_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
CPU_ENVIRONMENT |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
TIMEOUT = 240

_context = multiprocessing.get_context("forkserver")
# The last one DeepSpeed imports when it starts an engine; it brings torch's compiler, two seconds of it.
PRELOADED = ["train_sft", "train_dpo", "matplotlib.pyplot", "deepspeed.runtime.zero.muon.original_muon"]
_context.set_forkserver_preload(PRELOADED)


@dataclass
class Finished:
    """What a run left: each rank's exit code (negative: the signal that ended it), its output, its folder."""

    exit_codes: list[int]
    stdout: str
    stderr: str
    output_dir: Path

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.output_dir / "metrics.jsonl").read_text().splitlines()]

    def column(self, name: str) -> list:
        return [record[name] for record in self.metrics]

    def succeeded(self) -> "Finished":
        assert set(self.exit_codes) == {0}, self
        return self

    def refused(self, code: int) -> str:
        """The run's only `error:` line: every rank has ended with `code` and none with a traceback."""
        assert set(self.exit_codes) == {code} and "Traceback" not in self.stderr, self
        (error,) = (line for line in self.stderr.splitlines() if line.startswith("error: "))
        return error

    def __repr__(self):
        return f"exit codes {self.exit_codes}\n{self.stdout[-2000:]}\n{self.stderr[-4000:]}"


def flags(model, data, folder: Path, **changes) -> dict:
    """Of a float32 run that writes to folder/output and caches in folder/cache."""
    return {
        "model_name_or_path": model,
        "dataset_mixer": data,
        "dtype": "float32",
        "max_seq_length": 512,
        "output_dir": folder / "output",
        "cache_dir": folder / "cache",
        **changes,
    }


class Run:
    """A run under way."""

    def __init__(self, target, num_ranks: int, arguments: tuple, output_dir: Path = Path("."), on_gpu: bool = False):
        self.output_dir = output_dir
        self.logs = Path(tempfile.mkdtemp(prefix="plaintune-run-"))
        atexit.register(shutil.rmtree, self.logs, ignore_errors=True)
        context = multiprocessing.get_context("spawn") if on_gpu else _context  # whose server has no GPU
        environment = os.environ | ({} if on_gpu else CPU_ENVIRONMENT)
        environment["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests")])
        sizes = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        environment["TMPDIR"] = str(self.logs)  # all runs have one parent, by which ranks find each other
        self.processes = []
        with patch.dict(os.environ, environment):  # a fork server that is not running yet starts with this
            for rank in range(num_ranks):
                ranks = {name: str(value) for name, value in (sizes | {"RANK": rank, "LOCAL_RANK": rank}).items()}
                of_rank = environment | ranks, str(self.logs), target, arguments
                process = context.Process(target=_rank_main, args=of_rank)
                process.start()
                self.processes.append(process)

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for process in self.processes:
            process.kill()

    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait_until(self, has_come, timeout: float = TIMEOUT) -> bool:
        """Until has_come(), which is asked once more after the run's end; False if that came without it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            was_alive = self.is_alive()
            if has_come():
                return True
            if not was_alive:
                return False
            time.sleep(0.002)
        raise AssertionError(f"it did not come in {timeout} s\n{self.output()[-2000:]}")

    def wait_for(self, text: str) -> bool:
        """Until it has printed `text`; False if it ended before."""
        return self.wait_until(lambda: text in self.output())

    def output(self) -> str:
        """What it has printed so far."""
        return (self.logs / "stdout").read_text() if (self.logs / "stdout").exists() else ""

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        if hung := self.is_alive():
            self.kill()
            for process in self.processes:
                process.join()
        texts = [(self.logs / name).read_text() for name in ("stdout", "stderr")]
        done = Finished([process.exitcode for process in self.processes], *texts, self.output_dir)
        assert not hung, f"still running after {timeout} s\n{done}"
        return done


def start(script: str, flags: dict, num_ranks: int = 1, patches: dict | None = None) -> Run:
    """Starts `script` ("train_sft" or "train_dpo"). Curves are not drawn: that takes longer than the steps.

    flags: {name: value}; a list's items become several words. patches: {"common.module.NAME": value}, set in
    every rank first.
    """
    arguments = (script, argv(flags), patches or {})
    return Run(run_script, num_ranks, arguments, Path(flags.get("output_dir", ".")))


def launch(script: str, flags: dict, num_ranks: int = 1, patches: dict | None = None) -> Finished:
    return start(script, flags, num_ranks, patches).wait()


def on_ranks(function, num_ranks: int, *arguments, on_gpu: bool = False) -> list:
    """What function(*arguments) returned on each of num_ranks ranks; it must be a test module's own function."""
    run = Run(_function_main, num_ranks, (function.__module__, function.__name__, arguments), on_gpu=on_gpu)
    run.wait().succeeded()
    return [pickle.loads((run.logs / f"result_{rank}").read_bytes()) for rank in range(num_ranks)]


def launcher_command(script: str, flags: dict, num_ranks: int, launcher: str = "deepspeed") -> tuple[list[str], dict]:
    """The words and the environment of a run through `deepspeed` or `torchrun`."""
    bin_folder = Path(sys.executable).parent
    count = "--num_gpus" if launcher == "deepspeed" else "--nproc_per_node"
    options = [count, str(num_ranks), "--master_port", str(free_port())]
    environment = os.environ | CPU_ENVIRONMENT | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    return [str(bin_folder / launcher), *options, f"{script}.py", *argv(flags)], environment


def launch_for_real(script: str, flags: dict, num_ranks: int, launcher: str = "deepspeed") -> Finished:
    """As `launch`, through a real launcher; one exit code, the launcher's own."""
    command, environment = launcher_command(script, flags, num_ranks, launcher)
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    return Finished([done.returncode], done.stdout, done.stderr, Path(flags.get("output_dir", ".")))


def argv(flags: dict) -> list[str]:
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
    return words


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ------------------------------------------------------------------ in the rank's process


def _rank_main(environment: dict, logs: str, target, arguments: tuple) -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{logs}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(environment)
    target(logs, *arguments)


def run_script(logs: str, script: str, words: list[str], patches: dict) -> None:
    for name, value in {"common.run.output_dir.draw_curves": _no_curves, **patches}.items():
        module, attribute = name.rsplit(".", 1)
        assert hasattr(import_module(module), attribute), name
        setattr(import_module(module), attribute, value)
    sys.argv = [f"{script}.py", *words]
    import_module(script).main()


def _no_curves(*_) -> None:
    pass


def _function_main(logs: str, module: str, name: str, arguments: tuple) -> None:
    try:
        result = getattr(import_module(module), name)(*arguments)
        Path(logs, f"result_{os.environ['RANK']}").write_bytes(pickle.dumps(result))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
