"""run.sh: the verbs, the set-up, and signals and exit codes through DeepSpeed's real launcher.

    python -m pytest tests/test_run_sh.py

Each test runs run.sh in a project folder of its own: with a Python that only notes what is asked of it (set-up), or
with a training script of a few lines (launching).
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

RUN_SH = Path(__file__).resolve().parent.parent / "run.sh"
WAIT = 90  # seconds, on a machine with nothing to spare


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run_sh(folder, *words, cwd=None, **environment):
    """The finished process; stdout and stderr in one."""
    return subprocess.run(
        ["bash", folder / "run.sh", *words],
        cwd=cwd or folder,
        text=True,
        timeout=WAIT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )


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
esac
case "$*" in
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
    shutil.copy(RUN_SH, project)
    (project / "requirements.txt").write_text("numpy==1.0  # arrays\ntorch==2.13.0  # tensors\n")
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        executable(tmp_path / "bin" / name, FAKE_PYTHON)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PATCH": "1",
        "TORCH_INDEX_URL": "",
        "INSTALL_FLASH_ATTN": "",
    }
    return project, environment


def calls(project):
    return (project / "calls").read_text().splitlines() if (project / "calls").exists() else []


def test_setup_installs_torch_first_and_no_op_the_second_time(bare, tmp_path):
    project, environment = bare
    first = run_sh(project, "setup", cwd=tmp_path, **environment)
    assert first.returncode == 0, first.stdout
    venv, torch, rest = calls(project)
    assert venv.startswith("-m venv .venv")
    assert "torch==2.13.0" in torch and "#" not in torch and "numpy" not in torch and "index-url" not in torch
    assert "-r requirements.txt DS_BUILD_OPS=0" in rest
    second = run_sh(project, "setup", **environment)
    assert (second.returncode, second.stdout, len(calls(project))) == (0, "", 3)


def test_setup_takes_torch_alone_from_the_index_that_is_named(bare):
    project, environment = bare
    assert run_sh(project, "setup", **{**environment, "TORCH_INDEX_URL": "https://an/index"}).returncode == 0
    _, torch, rest = calls(project)
    assert "--index-url https://an/index torch==2.13.0" in torch and "index" not in rest


@pytest.mark.parametrize("step", ["venv", "torch==", "requirements.txt"])
def test_a_set_up_that_was_cut_off_is_done_over(bare, step):
    project, environment = bare
    broken = run_sh(project, "setup", **environment, FAIL_AT=step)
    assert broken.returncode == 1 and "error: " in broken.stdout
    assert run_sh(project, "setup", **environment).returncode == 0
    assert sum("-m venv" in call for call in calls(project)) == 2
    assert run_sh(project, "setup", **environment).stdout == ""


@pytest.mark.parametrize("change", ["requirements", "python"])
def test_a_change_of_requirements_or_python_sets_up_anew(bare, change):
    project, environment = bare
    run_sh(project, "setup", **environment)
    if change == "requirements":
        (project / "requirements.txt").write_text("torch==2.14.0\n")
    else:
        environment["PATCH"] = "2"
    run_sh(project, "setup", **environment)
    assert sum("-m venv" in call for call in calls(project)) == 2


def test_an_old_python_is_one_clear_error(bare):
    project, environment = bare
    result = run_sh(project, "setup", **environment, TOO_OLD="1")
    assert result.returncode == 2 and not (project / ".venv").exists()
    assert result.stdout.startswith("error: Python 3.11 or newer is needed") and result.stdout.count("\n") == 1


def test_flash_attn_is_built_only_on_request_and_its_failure_stops_nothing(bare, tmp_path):
    project, environment = bare
    run_sh(project, "setup", **environment)
    assert not any("flash" in call for call in calls(project))
    environment |= {"INSTALL_FLASH_ATTN": "1", "FAIL_AT": "flash"}
    without_gpu = run_sh(project, "setup", **environment)
    if not shutil.which("nvidia-smi") or not shutil.which("nvcc"):
        assert without_gpu.returncode == 0 and "left out" in without_gpu.stdout
        assert not any("pip install" in call and "flash" in call for call in calls(project))
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho 8.0\n")
    executable(tmp_path / "bin" / "nvcc", "#!/bin/sh\n")
    failing = run_sh(project, "setup", **environment)
    assert failing.returncode == 0 and "could not be built" in failing.stdout
    assert any("pip install" in call and "flash-attn==" in call for call in calls(project))
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\nprintf '10.0\\n9.0\\n'\n")
    failing = run_sh(project, "setup", **environment)
    assert failing.returncode == 0 and "could not be installed" in failing.stdout
    assert any("pip install" in call and "flash-attn-4[cu13]==" in call for call in calls(project))


@pytest.mark.parametrize(
    ("capabilities", "cuda", "asked", "installed"),
    [
        ("9.0\\n9.0", "13.0", "", True),
        ("9.0", "13.0", "0", False),
        ("9.0", "12.8", "", False),  # its wheels are of CUDA 13
        ("9.0", "", "", False),  # torch's CPU build
        ("9.0\\n8.0", "13.0", "", False),
        ("10.0", "13.0", "", False),  # not tried there
        ("10.0", "13.0", "1", True),
        ("8.0", "13.0", "", False),
    ],
)
def test_flash_attn_4_comes_by_itself_where_it_was_tried(bare, tmp_path, capabilities, cuda, asked, installed):
    project, environment = bare
    executable(tmp_path / "bin" / "nvidia-smi", f"#!/bin/sh\nprintf '{capabilities}\\n'\n")
    environment |= {"TORCH_CUDA": cuda, "INSTALL_FLASH_ATTN": asked, "FAIL_AT": "import flash_attn"}
    result = run_sh(project, "setup", **environment)
    assert result.returncode == 0, result.stdout
    assert any("pip install" in call and "flash-attn-4[cu13]==" in call for call in calls(project)) == installed
    assert (project / ".venv" / ".stamp").exists()


# ------------------------------------------------------------------ verbs
@pytest.mark.parametrize("words", [[], ["tset"], ["--help"], ["-h"]])
def test_no_verb_or_an_unknown_one_lists_the_verbs_and_sets_nothing_up(bare, words):
    project, environment = bare
    result = run_sh(project, *words, **environment)
    assert result.returncode == (0 if "h" in "".join(words) else 2) and not (project / ".venv").exists()
    for verb in ("setup", "sanity", "test", "sft|dpo"):
        assert verb in result.stdout
    assert ("error: " in result.stdout) == (words == ["tset"])


# A training script as short as possible. It notes each signal it gets in a file of its rank.
FAKE_SCRIPT = """
import os, signal, sys, time
rank, how = os.environ["RANK"], sys.argv[2]
note = lambda text: print(text, file=open(f"rank{rank}", "a"), flush=True)
asked = []
def receive(number, frame):
    note(signal.Signals(number).name)
    asked.append(number)
if how in ("heed", "ignore"):
    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)
note(f"{os.getpid()} {os.environ['WORLD_SIZE']} {os.environ.get('DS_ACCELERATOR')} {' '.join(sys.argv[2:])}")
if how == "exit":
    sys.exit(int(sys.argv[3]))
for _ in range(1200):
    time.sleep(0.05)
    if asked and how == "heed":
        time.sleep(1.5)  # the checkpoint
        note("saved")
        os._exit(128 + asked[0])
"""


@pytest.fixture
def project(tmp_path):
    """A project that is set up, whose train_sft.py is FAKE_SCRIPT; nothing of it may be left running."""
    shutil.copy(RUN_SH, tmp_path)
    (tmp_path / "requirements.txt").write_text("")
    (tmp_path / "train_sft.py").write_text(FAKE_SCRIPT)
    executable(
        tmp_path / ".venv/bin/python",
        f"""#!/bin/sh
case "$*" in *cuda.device_count*) echo 0; exit ;; esac  # seconds of importing torch
exec {sys.executable} "$@"
""",
    )
    subprocess.run(["bash", "-c", 'source ./run.sh; stamp "$(find_python)" >.venv/.stamp'], cwd=tmp_path, check=True)
    yield tmp_path
    left = [pid for pid in pids_of(tmp_path) if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


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


def start(project, *words):
    """run.sh in a process group of its own, as a terminal starts it, with both ranks running."""
    process = subprocess.Popen(
        ["bash", project / "run.sh", "sft", *words],
        cwd=project,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: len(pids_of(project)) == 2, "ranks")
    return process


def launcher(project):
    """The process id of DeepSpeed's launcher, two above the ranks."""
    pid = pids_of(project)[0]
    for _ in range(2):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


def test_two_ranks_get_the_flags_and_a_ranks_exit_code_passes_through(project, tmp_path):
    result = run_sh(project, "sft", "exit", "3", "--dataset_mixer", "two words")
    assert result.returncode == 3, result.stdout
    assert any(
        notes(project, rank)[0].endswith(" 2 cpu exit 3 --dataset_mixer two words")
        for rank in (0, 1)
        if notes(project, rank)
    )


def test_training_runs_where_the_user_stands_as_under_deepspeed_itself(project, tmp_path):
    """FAKE_SCRIPT notes into its working directory, which is that of relative paths."""
    elsewhere = tmp_path / "my data"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('not a module of the project')")
    result = run_sh(project, "sft", "1", "exit", "0", cwd=elsewhere)
    assert result.returncode == 0, result.stdout
    assert notes(elsewhere, 0)[0].endswith(" 1 cpu exit 0") and not notes(project, 0)


@pytest.mark.parametrize("verb", ["bench", "sanity"])
def test_bench_and_sanity_run_where_the_user_stands_whatever_modules_lie_there(project, tmp_path, verb):
    for folder, text in ((project, "import os; print('ours', os.getcwd())"), (tmp_path / "mine", "print('theirs')")):
        executable(folder / "common" / f"{verb}.py", text)
    result = run_sh(project, verb, cwd=tmp_path / "mine")
    assert result.stdout == f"ours {tmp_path / 'mine'}\n"


def test_a_run_that_ends_well_exits_0_on_as_many_ranks_as_asked_for(project):
    result = run_sh(project, "sft", "1", "exit", "0")
    assert result.returncode == 0, result.stdout
    assert notes(project, 0)[0].endswith(" 1 cpu exit 0") and not notes(project, 1)


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_each_rank_once_and_run_sh_waits_for_their_exit(project, number, exit_code):
    process = start(project, "heed")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C: the terminal signals the whole foreground group
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == exit_code, output
    for rank in (0, 1):
        # The launcher may end a rank itself once the other is gone, by SIGTERM: only after it has saved.
        assert notes(project, rank)[1:3] == [number.name, "saved"]


@pytest.mark.parametrize("number, exit_code", [(signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_stop_is_passed_on_when_the_output_has_no_reader_left(project, number, exit_code):
    """SIGINT: a Ctrl-C also ends the `tee` of `run.sh ... | tee log`. SIGHUP: the terminal was closed."""
    terminal, theirs = os.openpty()
    output = theirs if number == signal.SIGHUP else subprocess.PIPE

    def prepare():  # subprocess gives SIGPIPE its default action back by itself
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
        if number == signal.SIGHUP:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        ["bash", project / "run.sh", "sft", "heed"],
        cwd=project,
        start_new_session=True,
        stdout=output,
        stderr=subprocess.STDOUT,
        preexec_fn=prepare,
    )
    os.close(theirs)
    wait_for(lambda: len(pids_of(project)) == 2, "ranks")
    if number == signal.SIGINT:
        process.stdout.close()
        os.killpg(process.pid, number)
    os.close(terminal)  # of a terminal in use, this sends SIGHUP
    assert process.wait(WAIT) == exit_code
    for rank in (0, 1):
        assert notes(project, rank)[1:3] == [{"SIGHUP": "SIGTERM"}.get(number.name, number.name), "saved"]


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ranks_that_do_not_handle_signals_yet_end_and_the_exit_code_says_so(project, number, exit_code):
    process = start(project, "default")
    process.send_signal(number)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == exit_code, output


def test_a_stop_before_there_are_ranks_ends_the_launcher(project):
    process = subprocess.Popen(
        ["bash", project / "run.sh", "sft", "heed"],
        cwd=project,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
    )
    while "CPU processes" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 143, output


def test_the_third_request_kills_a_run_that_does_not_answer(project):
    process = start(project, "ignore")
    for count in (1, 2, 3):
        process.send_signal(signal.SIGINT)
        if count < 3:
            wait_for(lambda count=count: notes(project, 1).count("SIGINT") == count, f"SIGINT number {count}")
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 137, output


def test_a_launcher_that_is_signalled_itself_leaves_no_orphan_training(project):
    process = start(project, "heed")
    os.kill(launcher(project), signal.SIGTERM)
    output, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 143 and "stopping them" in output
    for rank in (0, 1):
        assert notes(project, rank)[1:3] == ["SIGTERM", "saved"]


def with_gpus(project, num_gpus, *words, **environment):
    """`run.sh sft WORDS` up to its launch command, which is printed, on a machine with that many GPUs."""
    script = f'source ./run.sh; num_gpus() {{ echo {num_gpus}; }}; launch() {{ echo "$@"; }}; train sft "$@"'
    return subprocess.run(
        ["bash", "-c", script, "bash", *words],
        cwd=project,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


@pytest.mark.parametrize(
    "num_gpus, words, devices, expected",
    [
        (8, [], "", "--num_gpus 8"),
        (8, ["2"], "", "--num_gpus 2"),
        (0, [], "", "--num_gpus 2"),
        (0, ["3"], "", "--num_gpus 3"),
        (4, [], "4,5,6,7", "--include localhost:4,5,6,7"),
        (4, ["2"], "4,5,6,7", "--include localhost:4,5"),
    ],
)
def test_the_number_of_ranks_and_the_visible_devices_are_heeded(project, num_gpus, words, devices, expected):
    result = with_gpus(project, num_gpus, *words, "--beta", "3", CUDA_VISIBLE_DEVICES=devices)
    assert f" {expected} --master_port " in result.stdout and result.stdout.endswith(
        f" {project}/train_sft.py --beta 3\n"
    )


@pytest.mark.parametrize("num_gpus, words", [(1, ["2"]), (8, ["0"]), (0, ["0"])])
def test_too_many_or_no_gpus_is_one_clear_error(project, num_gpus, words):
    result = with_gpus(project, num_gpus, *words)
    assert result.returncode == 2 and result.stdout.startswith("error: ") and result.stdout.count("\n") == 1
