"""What an error means to whoever started the run: pytest tests/test_failures.py"""

import errno
import logging
import os
import warnings

import launch
import pytest
import torch
from safetensors import SafetensorError

from common import failures
from common.failures import TrainingStopped, UserError, as_user_error, explained, one_line, progress, shown
from common.files import naming, replace_file, sync_folder
from common.zero.engine import oom_explained


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("as it is"), 2, "as it is"),
        (TrainingStopped("as it is"), 3, "as it is"),
        (OSError(28, "No space left on device", "/disk/a file"), 3, "/disk/a file: No space left on device"),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), 3, "File too large"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "out of memory"),
        (MemoryError(), 3, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
        (ConnectionResetError(104, "Connection reset by peer"), None, ""),
        (RuntimeError("a bug"), None, ""),
        (RuntimeError(f"{'NCCL error: ' * 20}\nLast error:\nError of segment /dev/shm/nccl-x (size 9)"), 2, "(size 9)"),
    ],
    ids=repr,
)
def test_an_error_has_one_meaning_at_the_exit(error, code, said):
    known = explained(error)
    assert (known and known.EXIT_CODE) == code
    assert said in str(known) and "\n" not in str(known)


def in_a_group(logs: str, words: list[str]) -> None:
    """In a rank's process: files are for a group to write and for nobody else."""
    os.umask(0o007)
    launch.run_script(logs, "train_dpo", words, {})


def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(tiny_llama, dpo_data, tmp_path):
    flags = launch.flags(tiny_llama, dpo_data, tmp_path, max_train_steps=1, checkpointing_steps=1)
    launch.Run(in_a_group, 1, (launch.argv(flags),), tmp_path / "output").wait().succeeded()
    files = [path for name in ("output", "cache") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 15 and {oct(path.stat().st_mode & 0o777) for path in files} == {"0o660"}, files


@pytest.mark.parametrize("code", ["\x1b[2J", "\x07", "\x9b31m", "\u202e", "\r", "\x00"])
def test_control_characters_are_shown_and_a_text_is_cut(code):
    assert code not in shown(f"a{code}b") and shown(f"a{code}b")[2:].isprintable() and shown(f"a{code}b")[0] == "a"
    assert code not in one_line(f"a{code}b") and shown("漢\n\tb") == "漢\n\tb"
    assert len(shown("x" * 10**6, 60)) < 100 and len(shown("x" * 60, 60)) == 60


def test_a_write_that_fails_names_its_file(tmp_path, monkeypatch):
    """The system's error of a write or a flush, unlike that of an open, names none."""
    full = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))  # noqa: E731
    with pytest.raises(OSError) as e, naming(tmp_path / "a"), open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert e.value.filename == str(tmp_path / "a")
    monkeypatch.setattr(os, "fsync", full)
    for write, name in ((lambda: replace_file(tmp_path / "b", "x"), ".b."), (lambda: sync_folder(tmp_path), "")):
        with pytest.raises(OSError) as e:
            write()
        assert e.value.filename.startswith(f"{tmp_path}/{name}".rstrip("/"))


def test_a_mistake_says_what_and_why_in_one_line_and_names_a_file_once():
    for said, error, reason in (
        ("--model /m", OSError(13, "Permission denied", "/m/a.json"), "/m/a.json: Permission denied"),
        ("--file /m/a.json", OSError(13, "Permission denied", "/m/a.json"), "Permission denied"),
        ("template 'a\\nb'", OSError(36, "File name too long", "a\nb"), "File name too long"),
        ("row 3", ValueError("two\nlines"), "two lines"),
        ("row 3", KeyError("k"), "KeyError: 'k'"),
    ):
        with pytest.raises(UserError) as seen, as_user_error(said, OSError, ValueError, KeyError):
            raise error
        assert str(seen.value) == f"{said}: {reason}"


def test_other_errors_mistakes_already_said_and_what_is_no_mistake_go_through():
    full = OSError(28, "No space left on device")
    for error in (UserError("as it is"), MemoryError(), torch.OutOfMemoryError(), full):
        with pytest.raises(type(error)) as seen, as_user_error("x"):
            raise error
        assert seen.value is error
    with pytest.raises(KeyError), as_user_error("x", OSError):
        raise KeyError


ADVICE = [(12_500, 30_000, 900, "Try --max_tokens_per_micro_batch 6250, --gradient")]  # 15000 would change nothing
ADVICE += [(16_000, 16_384, 9_000, "Try --max_tokens_per_micro_batch 9000, --gradient")]
ADVICE += [
    (9_000, 16_384, 9_000, "Try --gradient_checkpointing full"),
    (0, 16_384, 9_000, "Try more devices, or a --ds_c"),
]


@pytest.mark.parametrize(("tokens", "budget", "longest", "advised"), ADVICE)
def test_out_of_memory_advises_what_changes_something(tokens, budget, longest, advised):
    with pytest.raises(TrainingStopped) as error, oom_explained("step 7", budget, longest) as size:
        size.tokens = tokens
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert str(error.value).startswith("step 7: out of memory") and advised in str(error.value)
    assert (f"on a micro-batch of {tokens:,} tokens" in str(error.value)) == (tokens > 0)


def test_progress_is_told_in_lines_where_there_is_no_terminal(monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr("common.failures.time.monotonic", lambda: now[0])
    with progress("counting", 5000, "sheep", lines.append) as advance:
        for seconds in (10, 31, 40, 62):
            now[0] = seconds
            advance(1000)
    assert lines == ["counting: 2,000 of 5,000 sheep", "counting: 4,000 of 5,000 sheep"]


def test_what_libraries_warn_of_is_in_the_log_and_not_on_the_terminal(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(failures, "_log_path", None)
    for name in ("", "transformers", "DeepSpeed"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    failures.log_libraries()
    warnings.warn("before there is a folder", stacklevel=1)
    logging.captureWarnings(False)
    failures.log_to(tmp_path / "logs" / "rank_0.log")
    logging.getLogger("some.library").warning("means nothing")
    failures.print_line("ours")
    logged = (tmp_path / "logs" / "rank_0.log").read_text()
    assert all(text in logged for text in ("before there is a folder", "some.library: means nothing", "ours"))
    out, err = capfd.readouterr()
    assert out == "ours\n" and err == ""
