"""run.sh and the launcher of ranks: the verbs, the set-up, signals and exit codes: pytest tests/test_run_sh.py

Each test runs run.sh in a project folder of its own: with a Python that only notes what is asked of it (set-up), or
with a training script of a few lines (launching).
"""

import fcntl
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.failures import UserError
from common.verbs import launch

WAIT = 90  # seconds, on a machine with nothing to spare


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run_sh(folder, *words, cwd=None, **environment):
    """The finished process; stdout and stderr in one."""
    options = dict(text=True, timeout=WAIT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    command = ["bash", folder / "run.sh", *words]
    return subprocess.run(command, cwd=cwd or folder, env={**os.environ, **environment}, **options)


def wait_for(condition, what):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {WAIT} s"
        time.sleep(0.05)


# ------------------------------------------------------------------ set-up
FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for a Python and its venv: notes what is asked of it in `calls`; FAIL_AT names the call that fails.
case "$*" in
    -V*) echo "Python 3.12.$PATCH"; exit ;;
    *version_info*) exit "${TOO_OLD:-0}" ;;
    *torch.version.cuda*) echo "${TORCH_CUDA:-}"; exit ;;
esac
echo "$* DS_BUILD_OPS=${DS_BUILD_OPS:-}" >>calls
if [[ -n ${FAIL_AT:-} && $* == *$FAIL_AT* ]]; then exit 1; fi
if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


@pytest.fixture
def bare(tmp_path):
    """A project where nothing is set up, and the environment in which every Python is the fake one."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(launch.REPO / "run.sh", project)
    (project / "requirements.txt").write_text("numpy==1.0  # arrays\ntorch==2.13.0  # tensors\n")
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        executable(tmp_path / "bin" / name, FAKE_PYTHON)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return project, {"PATH": path, "PATCH": "1", "TORCH_INDEX_URL": "", "INSTALL_FLASH_ATTN": ""}


def calls(project):
    return (project / "calls").read_text().splitlines() if (project / "calls").exists() else []


@pytest.mark.parametrize("index", ["", "https://an/index"])
def test_setup_installs_torch_first_and_is_a_no_op_the_second_time(bare, tmp_path, index):
    project, environment = bare
    first = run_sh(project, "setup", cwd=tmp_path, **environment | {"TORCH_INDEX_URL": index})
    assert first.returncode == 0, first.stdout
    venv, torch, rest = calls(project)
    assert venv.startswith("-m venv .venv") and "-r requirements.txt DS_BUILD_OPS=0" in rest and "index" not in rest
    assert "torch==2.13.0" in torch and "#" not in torch and "numpy" not in torch
    assert ("--no-deps --index-url https://an/index" in torch) == ("index-url" in torch) == bool(index)
    second = run_sh(project, "setup", **environment)
    assert (second.returncode, second.stdout, len(calls(project))) == (0, "", 3)


@pytest.mark.parametrize("fail_at", ["venv", "torch==", "requirements.txt", "change", "python", "old"])
def test_a_set_up_that_was_cut_off_or_is_of_other_requirements_or_python_is_done_over(bare, fail_at):
    project, environment = bare
    first = run_sh(project, "setup", **environment, FAIL_AT=fail_at, TOO_OLD=str(int(fail_at == "old")))
    if fail_at == "change":
        (project / "requirements.txt").write_text("torch==2.14.0\n")
    assert first.returncode == {"change": 0, "python": 0, "old": 2}.get(fail_at, 1)
    assert first.stdout.count("error: ") == (first.returncode > 0)
    environment |= {"PATCH": "2"} if fail_at == "python" else {}
    assert run_sh(project, "setup", **environment).returncode == 0
    assert sum("-m venv" in call for call in calls(project)) == (1 if fail_at == "old" else 2)
    assert run_sh(project, "setup", **environment).stdout == ""


# Capability of the GPUs, torch's CUDA (the wheels are of 13), INSTALL_FLASH_ATTN; whether it is installed.
FLASH = [("9.0\\n9.0", "13.0", "", True), ("9.0", "13.0", "0", False), ("9.0", "12.8", "", False)]
FLASH += [("9.0\\n8.0", "13.0", "", False), ("10.0", "13.0", "", False), ("10.0", "13.0", "1", True)]


@pytest.mark.parametrize(("capabilities", "cuda", "asked", "installed"), [*FLASH, ("", "", "1", False)])
@pytest.mark.parametrize("fails", [False, True])
def test_flash_attn_comes_where_it_was_tried(bare, tmp_path, capabilities, cuda, asked, installed, fails):
    """And stops nothing where it fails."""
    project, environment = bare
    executable(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\nprintf '{capabilities}\\n'\n")
    environment |= {"TORCH_CUDA": cuda, "INSTALL_FLASH_ATTN": asked, "FAIL_AT": "flash" if fails else "import flash"}
    result = run_sh(project, "setup", **environment)
    assert result.returncode == 0 and (project / ".venv" / ".stamp").exists()
    assert any("pip install" in call and "flash-attn-4[cu13]==" in call for call in calls(project)) == installed
    assert ("left out" in result.stdout) == (installed and fails or asked == "1" and not installed)


# ------------------------------------------------------------------ verbs
@pytest.mark.parametrize("words", [[], ["tset"], ["--help"], ["-h"]])
def test_no_verb_or_an_unknown_one_lists_the_verbs_and_sets_nothing_up(bare, words):
    project, environment = bare
    result = run_sh(project, *words, **environment)
    assert result.returncode == (0 if "h" in "".join(words) else 2) and not (project / ".venv").exists()
    assert all(verb in result.stdout for verb in ("setup", "sanity", "bench", "test", "sft|dpo"))
    assert ("error: " in result.stdout) == (words == ["tset"])


SUITES = [("", "visible_gpus", "tests", 0), ("", "", "tests; -m cuda tests", 0)]  # without a GPU, with one
SUITES += [("", "-q tests", "tests; -m cuda tests", 1), ("", "-m cuda", "tests; -m cuda tests", 1)]


@pytest.mark.parametrize(("flags", "fail_at", "ran", "exit_code"), [*SUITES, ("-x tests/x.py", "", "-x tests/x.py", 0)])
def test_the_suite_has_its_cuda_tests_where_there_is_a_gpu(bare, flags, fail_at, ran, exit_code):
    project, environment = bare
    assert run_sh(project, "test", *flags.split(), **environment, FAIL_AT=fail_at).returncode == exit_code
    started = [call.partition("pytest -q ")[2].split(" DS_")[0] for call in calls(project) if "pytest" in call]
    assert "; ".join(started) == ran


def test_the_front_imports_nothing_that_takes_seconds():
    verbs = "bench, compare, data, export, launch, plan, push, sanity, verify"
    code = f"import sys; from common.verbs import {verbs}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], cwd=launch.REPO, capture_output=True).stdout == b"set()\n"


# ------------------------------------------------------------------ launching
# A training script as short as possible. It notes each signal it gets in a file of its rank.
FAKE_SCRIPT = """
import json, os, signal, sys, time
rank, how = os.environ["RANK"], sys.argv[1]
note = lambda text: print(text, file=open(f"rank{rank}", "a"), flush=True)
asked = []
def receive(number, frame):
    note(signal.Signals(number).name)
    asked.append(number)
if how in ("heed", "ignore", "hang", "finish"):
    signal.signal(signal.SIGTERM, receive)
note(f"{os.getpid()} {os.environ['WORLD_SIZE']} {os.environ.get('DS_ACCELERATOR')} {' '.join(sys.argv[1:])}")
if how == "exit" or how == "hang" and rank == "1":
    sys.exit(int(sys.argv[2]))
for _ in range(1200):
    time.sleep(0.05)
    if asked and how in ("heed", "finish"):
        time.sleep(1.5)  # the checkpoint, or the export
        note("saved")
        os._exit(128 + asked[0] if how == "heed" else 0)
"""
FAKE_CONFIG = """
class SFTConfig: resume, output_dir, model_name_or_path = "auto", ".", "on/the/hub"
DPOConfig = TrainConfig = SFTConfig
def parse_config(cls): return cls
"""


@pytest.fixture
def project(tmp_path):
    """A project that is set up, whose train_sft.py is FAKE_SCRIPT; nothing of it may be left running."""
    shutil.copy(launch.REPO / "run.sh", tmp_path)
    shutil.copytree(launch.REPO / "common", tmp_path / "common")
    launcher = tmp_path / "common/verbs/launch.py"
    text = launcher.read_text().replace("GRACE = 30.0", "GRACE = 4.0").replace("ANSWER = 10.0", "ANSWER = 0.5")
    launcher.write_text(text)
    (tmp_path / "common/config.py").write_text(FAKE_CONFIG)
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "train_sft.py").write_text(FAKE_SCRIPT)
    executable(tmp_path / ".venv/bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    stamp = "{ python3 -VV; cat requirements.txt; } | sha256sum >.venv/.stamp"
    subprocess.run(["bash", "-c", stamp], cwd=tmp_path, check=True)
    yield tmp_path
    deadline = time.monotonic() + 5
    while (left := [pid for pid in pids_of(tmp_path) if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [os.kill(pid, signal.SIGKILL) for pid in left]


def notes(project, rank):
    path = project / f"rank{rank}"
    return path.read_text().splitlines() if path.exists() else []


def pids_of(project):
    return [int(notes(project, rank)[0].split()[0]) for rank in (0, 1) if notes(project, rank)]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(project, *words, terminal=None, **options):
    """run.sh in a process group of its own, as a terminal starts it, with both ranks running."""

    def prepare():
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # which `&` and nohup may have had ignored
            signal.signal(number, signal.SIG_DFL)
        if terminal is not None:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    options = {"stdout": terminal or subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    command = ["bash", project / "run.sh", "sft", *words]
    process = subprocess.Popen(command, cwd=project, start_new_session=True, preexec_fn=prepare, **options)
    wait_for(lambda: len(pids_of(project)) == 2, "ranks")
    return process


@pytest.mark.parametrize("words", [("exit", "3", "--mixer", "two words"), ("1", "exit", "0"), ("2", "exit", "2")])
def test_as_many_ranks_as_asked_for_get_the_flags_where_the_user_stands(project, tmp_path, words):
    """FAKE_SCRIPT notes into its working directory, which is that of relative paths."""
    elsewhere = tmp_path / "my data"
    for name in ("json.py", "common/verbs/launch.py"):
        executable(elsewhere / name, "raise SystemExit('not a module of the project')")
    result = run_sh(project, "sft", *words, cwd=elsewhere)
    num_ranks, flags = (int(words[0]), words[1:]) if words[0].isdecimal() else (2, words)
    assert result.returncode == int(flags[1]), result.stdout
    assert [bool(notes(elsewhere, rank)) for rank in (0, 1)] == [True, num_ranks == 2] and not notes(project, 0)
    assert notes(elsewhere, 0)[0].endswith(f" {num_ranks} cpu {' '.join(flags)}")


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
@pytest.mark.parametrize("how", ["heed", "default", "finish"])
def test_a_request_reaches_each_rank_once_and_run_sh_waits_for_their_exit(project, number, exit_code, how):
    """SIGHUP: of a terminal that is closed. With `heed` nobody reads the output, as once a Ctrl-C has ended the `tee`
    of `run.sh ... | tee log`; with `default` the ranks do not train yet; with `finish` only the export is left."""
    ours, theirs = os.openpty()
    process = start(project, how, terminal=theirs if number == signal.SIGHUP else None)
    os.close(theirs)
    os.close(ours)  # of a terminal in use, this sends SIGHUP
    if number != signal.SIGHUP:
        if how == "heed":
            process.stdout.close()
        os.killpg(process.pid, number)  # as a terminal signals the whole foreground group
    assert process.wait(WAIT) == (0 if how == "finish" else exit_code)
    for rank in (0, 1):
        assert notes(project, rank)[1:] == ([] if how == "default" else ["SIGTERM", "saved"])
    if number != signal.SIGHUP and how != "heed":
        assert ("stopped before training" in process.stdout.read()) == (how == "default")


@pytest.mark.parametrize("numbers", [[signal.SIGINT, signal.SIGTERM, signal.SIGINT], [signal.SIGQUIT]])
def test_the_third_request_or_sigquit_kills_a_run_that_does_not_answer(project, numbers):
    process = start(project, "ignore")
    for count, number in enumerate(numbers):
        wait_for(lambda count=count: notes(project, 1).count("SIGTERM") == count, f"request {count}")
        process.send_signal(number)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 137 and "killing" in output


def test_a_rank_that_does_not_answer_a_request_is_named_and_what_the_next_ones_do_is_said(project):
    process = start(project, "heed")
    os.kill(pids_of(project)[1], signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=WAIT)
    assert "A second request" in output and "a third" in output
    assert "rank 1: T (stopped)" in output and "rank 0: T" not in output and notes(project, 0)[-1] == "saved"
    assert process.returncode == 143


def test_ranks_whose_launcher_is_killed_save_and_end(project):
    process = start(project, "heed")
    process.kill()
    for rank in (0, 1):
        wait_for(lambda rank=rank: notes(project, rank)[1:] == ["SIGTERM", "saved"], f"checkpoint of rank {rank}")


def test_the_guides_script_for_slurm_waits_for_the_checkpoint_and_asks_to_be_started_again(project):
    """Slurm's signal reaches the script alone."""
    guide = (launch.REPO / "docs" / "guide.md").read_text()
    script = re.search(r"#!/bin/bash\n#SBATCH --nodes=1 .*?exit \S+\n", guide, re.DOTALL)[0]
    executable(project / "job.sh", script.replace("sft --output_dir /shared/sft --cache_dir /shared/cache", "sft heed"))
    executable(project / "bin" / "scontrol", '#!/bin/sh\necho "$@" >scontrol\n')
    environment = os.environ | {"PATH": f"{project}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(["bash", "job.sh"], cwd=project, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(pids_of(project)) == 2, "ranks")
    process.terminate()
    assert process.wait(WAIT) == 143 and (project / "scontrol").read_text() == "requeue 77\n"
    assert [notes(project, rank)[1:] for rank in (0, 1)] == [["SIGTERM", "saved"]] * 2


@pytest.mark.parametrize(("how", "exit_code"), [("hang", 3), ("heed", 137)])
def test_a_rank_that_goes_on_when_another_has_failed_is_killed_and_the_first_exit_code_stands(project, how, exit_code):
    process = start(project, how, "3")
    if how == "heed":
        os.kill(pids_of(project)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == exit_code and f"ended with {exit_code}" in output
    assert "killing" in output and not notes(project, 0)[1:]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(num_gpus, build="+cu130", devices=None): a machine as launch.py sees it."""

    def make(num_gpus, build="+cu130", devices=None):
        listed = "".join(f"GPU {i}: NVIDIA H100\n  MIG 1g.10gb Device 0\n" for i in range(num_gpus))
        executable(tmp_path / "bin/nvidia-smi", f"#!/bin/sh\nprintf '{listed}'\n")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        monkeypatch.setattr(launch, "version", lambda name: f"2.13.0{build}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if devices is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)

    return make


GPUS = [((8,), [], 8, "0,1,2,3,4,5,6,7"), ((8,), ["2"], 2, "0,1"), ((0,), ["3"], 3, None), ((8, "+cpu"), [], 2, None)]
GPUS += [((8, "+cu130", "4,5, 6,7"), ["2"], 2, "4,5"), ((8, "+cu130", "GPU-8f2e,-1,3"), [], 1, "GPU-8f2e")]


@pytest.mark.parametrize(("gpus", "number", "num_ranks", "devices"), [*GPUS, ((8, "+cu130", ""), [], 2, None)])
def test_the_number_of_ranks_and_the_visible_devices_are_heeded(machine, monkeypatch, gpus, number, num_ranks, devices):
    machine(*gpus)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(launch, "launch", lambda *arguments: arguments)
    monkeypatch.setattr(sys, "argv", sys.argv)
    command, environment, number = launch.main("sft", *number, "--seed", "3")
    assert number == num_ranks == int(environment["WORLD_SIZE"]) == int(environment["LOCAL_WORLD_SIZE"])
    assert command[-3:] == [str(launch.REPO / "train_sft.py"), "--seed", "3"]
    assert environment.get("DS_ACCELERATOR") == (None if devices else "cpu")
    assert not devices or environment["CUDA_VISIBLE_DEVICES"] == devices


@pytest.mark.parametrize("num_gpus, words", [(1, ["2"]), (8, ["0"]), (0, ["0"])])
def test_too_many_or_no_gpus_is_refused(machine, num_gpus, words):
    machine(num_gpus)
    with pytest.raises(UserError, match=f"N = {words[0]}"):
        launch.split_number(words)


IN_WORDS = {  # verb -> its words, and what the line names
    "data": [("", "sft|dpo"), ("sfd", "sft|dpo"), ("sft --show x", "--show"), ("sft --show", "--show")],
    "plan": [("", "sft|dpo"), ("sft --gpu h1000", "--gpu"), ("sft 0", "N is"), ("sft --mfu 40", "--mfu")],
    "bench": [("", "sft|dpo"), ("sft --shape huge", "--shape"), ("sft 0", "N = 0"), ("sft --lr 1", "--learning_rate")],
    "sanity": [("sfd", "sanity sft"), ("sft 0", "N = 0"), ("sft --lr 1", "--learning_rate")],
    "compare": [("", "compare OUT1"), ("--picture x.png", "compare OUT1"), ("one --what", "compare OUT1")],
    "verify": [("", "verify OUT"), ("a b", "verify OUT"), ("a --step", "--step"), ("a --step x", "--step")],
    "export": [("", "export CHECK"), ("a", "export CHECK"), ("a b c", "export CHECK"), ("a b", "checkpoint a")],
    "push": [("", "push OUT"), ("--hub_private true", "push OUT"), ("nowhere", "nowhere")],
}
IN_WORDS["plan"] += [("sft --mfu 0", "--mfu"), ("sft --host_memory_gb -1", "--host_memory_gb"), ("sft --gpu", "--gpu")]
IN_WORDS["verify"] += [("a --what", "verify OUT"), ("nowhere", "nowhere")]
IN_WORDS["compare"] += [("one --picture", "--picture"), ("nowhere", "nowhere")]


@pytest.mark.parametrize(("verb", "words", "named"), [(verb, *case) for verb in IN_WORDS for case in IN_WORDS[verb]])
def test_a_mistake_in_a_verbs_words_is_named_and_nothing_is_written(tmp_path, monkeypatch, verb, words, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(named)):
        importlib.import_module(f"common.verbs.{verb}").main(*words.split())
    assert not list(tmp_path.iterdir())


def test_a_request_for_help_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verb", "sft", "--help"])
    verb = SimpleNamespace(__name__="verb", __doc__="what it does")
    assert launch.exit_with(verb) is None and capsys.readouterr().out == "what it does\n"


@pytest.mark.parametrize("module", ["torch", "yaml"])
@pytest.mark.parametrize("what", ["train_sft.py", "train_dpo.py", "export", "plan sft", "run.sh"])
def test_a_ctrl_c_before_anything_was_begun_is_one_line(what, module, tmp_path):
    """Sent by what stands in place of a module that takes long; of run.sh, in place of Python."""
    text = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\n"
    (tmp_path / f"{module}.py").write_text(text)
    command = [sys.executable, *([what] if "train" in what else f"-m common.verbs {what}".split())]
    command += ["a", "b"] if what == "export" else []
    if what == "run.sh":
        executable(tmp_path / "python3", "#!/bin/sh\nkill -INT $PPID; exec sleep 0.1\n")
        command = ["bash", what, "setup"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    handle = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - `&` may have had it ignored
    options = dict(capture_output=True, text=True, timeout=WAIT, preexec_fn=handle)
    done = subprocess.run(command, cwd=launch.REPO, env=environment, **options)
    assert done.returncode == 130 and "Traceback" not in done.stdout
    assert done.stderr.strip().startswith("stopped") and "\n" not in done.stderr.strip()


MISTAKES = ["lerning_rate 1", "resume nowhere", "output_dir /proc/x", "eval_steps 3", "model_name_or_path huge"]


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_rank_is_started(flag, tmp_path):
    """The last: a model that no disk here could hold."""
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text("{}")
    header = b'{"x": {"dtype": "F32", "shape": [1000000000, 1000000], "data_offsets": [0, 4]}}'
    (tmp_path / "huge" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    command = [sys.executable, "-m", "common.verbs", "launch", "dpo", "--output_dir=out", *f"--{flag}".split()]
    environment = os.environ | {"PYTHONPATH": str(launch.REPO)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WAIT)
    named = flag.split()[0] if "huge" not in flag else "--output_dir: 2,000,000.0 GB for 0 checkpoints and 1"
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and named in done.stderr
