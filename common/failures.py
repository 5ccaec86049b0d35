"""How a run ends early on purpose (its exit codes), what an error means to whoever started it, and lines of output."""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PROGRESS_SECONDS = 30  # between progress lines, where there is no terminal for a bar


class UserError(ValueError):
    """A mistake in what was asked for, found before any training: one line that says what, where and what to do."""

    EXIT_CODE = 2


class TrainingStopped(RuntimeError):
    """Training stopped itself (numbers that are not finite, no memory, a full disk): where, and what to try."""

    EXIT_CODE = 3


def shown(text: str, longest: int = 2000) -> str:
    """Text of a file, fit for a terminal: control characters but newline and tab as `\\x1b`, and cut to a length."""
    cut = text if len(text) <= longest else f"{text[:longest]} ... ({len(text) - longest:,} characters more)"
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in cut)


def named_file(path: str | Path) -> Path:
    """The path of a file that is asked for. Raises OSError where it names a device or a FIFO, which may never end."""
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise OSError(errno.EINVAL, "neither a file nor a folder", str(path))
    return Path(path)


def one_line(error: object) -> str:
    """An error's text as part of a line."""
    return shown(" ".join(str(error).split())[:300])


def explained(error: Exception) -> UserError | TrainingStopped | None:
    """What a run says of a library's error and exits with; None for a bug, which keeps its traceback."""
    if isinstance(error, UserError | TrainingStopped):
        return error
    if is_out_of_memory(error):
        what = one_line(error) or type(error).__name__
        advice = "more devices, or a --ds_config that offloads"
        return TrainingStopped(f"out of memory outside a micro-batch ({what}): {advice}")
    if "/dev/shm/nccl" in str(error):
        why = one_line(str(error).rpartition("Last error:")[2])
        return UserError(f"/dev/shm cannot hold what ranks share ({why}): free it, or mount a larger one")
    if errno_of(error) and not isinstance(error, ConnectionError):
        why = f"a file could not be read or written: {_reason(error, '')}"
        return TrainingStopped(f"{why}; what was complete before stands: mend that and run the same command")
    return None


@contextmanager
def as_user_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an error of these kinds (none named: of any) into a UserError that says what went wrong, and why.

    A UserError goes through as it is, and so does what is no mistake of the user's: a full disk, and no memory.
    """
    try:
        yield
    except Exception as e:
        full = errno_of(e) in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(e, UserError) or not isinstance(e, kinds or Exception) or full or is_out_of_memory(e):
            raise
        raise UserError(f"{what}: {_reason(e, what)}") from e


def errno_of(error: Exception) -> int:
    """The system's number of an error, 0 if it has none; safetensors and tokenizers give it as text."""
    as_text = re.search(r"\(os error (\d+)\)", str(error))
    return int(as_text[1]) if as_text else (isinstance(error, OSError) and error.errno) or 0


def _reason(error: Exception, said: str) -> str:
    """The text of an OSError, and its file unless `said` names it; of another error than ValueError, its type too."""
    if not isinstance(error, OSError) or not error.strerror:
        return one_line(error) if type(error) is ValueError else f"{type(error).__name__}: {one_line(error)}"
    file = str(error.filename or "")
    return error.strerror if file in said or repr(file) in said else f"{one_line(file)}: {error.strerror}"


def is_out_of_memory(error: Exception) -> bool:
    """Of a device, or of the host, where torch's allocator raises a bare RuntimeError. torch is not imported here."""
    is_hosts = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return is_hosts or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


_said: deque[str] = deque(maxlen=10_000)  # lines of this process that no log holds yet, with their times
_log_path: Path | None = None


def log_to(path: Path) -> None:
    """From here on each line that this process prints, and those before, also go to the end of a file, with times."""
    global _log_path
    path.parent.mkdir(exist_ok=True)
    _log_path = path


def _log(text: str) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    _said.extend(f"{now}  {line}\n" for line in text.splitlines())
    if _log_path is not None and _said:
        with contextlib.suppress(OSError), open(_log_path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(_said))  # a log is not worth a run that goes on
        _said.clear()


class _ToLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _log(f"{record.name}: {record.getMessage()}")


def log_libraries() -> None:
    """What libraries warn of goes to the log, and to the terminal only where they print it themselves."""
    logging.captureWarnings(True)
    for name in ("", "transformers", "DeepSpeed"):  # the two pass nothing on
        logging.getLogger(name).addHandler(_ToLog(logging.WARNING))


def print_line(text: str, stream: TextIO | None = None, end: str = "\n", is_live: bool = False) -> None:
    """print, and to the log; once nobody can read the stream (None: stdout), as of a closed terminal or pipe, it goes
    nowhere. is_live: on a terminal the next line, of whatever process, takes its place."""
    _log(text)
    stream = stream or sys.stdout
    if stream.isatty():
        text = f"\r\x1b[K{text}"
        text, end = (text[: shutil.get_terminal_size().columns + 3], "") if is_live else (text, end)
    try:
        print(text, file=stream, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def progress(what: str, total: int, unit: str, say: Callable[[str], None] = print_line, has_bar=True) -> Iterator:
    """Gives advance(n): n more are done. Shown as a bar on a terminal if has_bar, else by say, now and then."""
    from tqdm import tqdm

    done, said = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        bar.update(n)
        if bar.disable and time.monotonic() - said > PROGRESS_SECONDS:
            said = time.monotonic()
            say(f"{what}: {done:,} of {total:,} {unit}")

    with tqdm(desc=what, total=total, unit=unit, disable=not (has_bar and total and sys.stderr.isatty())) as bar:
        yield advance
