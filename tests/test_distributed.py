"""Output that nobody reads, or that a terminal cannot show: pytest tests/test_distributed.py"""

import os
import signal
import subprocess
import sys
import time

import launch
import pytest


def run_main(body: str, **settings) -> subprocess.Popen:
    """A process whose script's main is `body`; it has said "ready" on stdout once imports are done."""
    program = (
        f"import sys\nfrom common.failures import UserError; from common.stopping import main_with_exit_codes, StopRequest\n"
        f"print('ready', flush=True)\n@main_with_exit_codes\ndef main():\n    {body}\nmain()"
    )
    environment = os.environ | launch.CPU_ENVIRONMENT | settings.pop("env", {})
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=launch.REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **settings,
    )


def test_what_a_terminal_cannot_show_is_escaped():
    for body, stream in (("print('\\u6f22')", 0), ("raise UserError('\\u6f22')", 1)):
        process = run_main(body, env={"PYTHONIOENCODING": "ascii"})
        output = process.communicate(timeout=launch.TIMEOUT)
        assert "\\u6f22" in output[stream] and "Traceback" not in output[1]
        assert process.returncode == 2 * stream


@pytest.mark.parametrize(("body", "exit_code"), [("raise UserError('no')", 2), ("raise KeyError('no')", 1)])
def test_the_exit_code_is_the_same_if_nobody_reads_why(body, exit_code):
    process = run_main(f"sys.stdin.read(); {body}", stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(launch.TIMEOUT) == exit_code


def stop_request_of_a_lost_reader(ranks):
    """What train_sft.py calls before its loop; from here on stdout and stderr are pipes that nobody reads."""
    from common.stopping import StopRequest

    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)
    return StopRequest(ranks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_nobody_reads_any_more_is_stopped_with_a_checkpoint(tiny_llama, sft_data, tmp_path, number):
    flags = {
        "model_name_or_path": tiny_llama,
        "dataset_mixer": sft_data,
        "dtype": "float32",
        "max_seq_length": 512,
        "output_dir": tmp_path / "output",
        "cache_dir": tmp_path / "cache",
        "max_train_steps": 100000,
    }
    run = launch.start("train_sft", flags, 2, {"train_sft.StopRequest": stop_request_of_a_lost_reader})
    metrics = tmp_path / "output" / "metrics.jsonl"
    deadline = time.monotonic() + launch.TIMEOUT
    while not (metrics.is_file() and metrics.stat().st_size) and run.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in run.processes:
        os.kill(process.pid, number)
    assert run.wait().exit_codes == [128 + number] * 2
    assert len(list((tmp_path / "output" / "checkpoints").glob("step_*/COMPLETE"))) == 1


def test_the_answer_to_a_stop_during_the_export_is_not_missed(monkeypatch):
    """The handler's own line, on a pipe that nobody reads."""
    from common.stopping import StopRequest

    request = StopRequest.__new__(StopRequest)
    request.signal_number, request.answered_at, request.is_exporting = 0, float("inf"), True

    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    request._receive(signal.SIGTERM, None)
    assert request.signal_number == signal.SIGTERM
