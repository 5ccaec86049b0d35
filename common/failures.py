"""The two ways in which a run ends early on purpose, and their exit codes (INTERFACE: "Exit codes"); lines of output."""

import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from safetensors import SafetensorError
from tqdm import tqdm

PROGRESS_SECONDS = 30  # between progress lines, where there is no terminal for a bar


class UserError(ValueError):
    """A mistake in what was asked for, found before any training.

    Its text is one clear line that says what, where and what to do. One rank prints it as
    `error: <text>`; every rank exits with EXIT_CODE and no traceback.
    """

    EXIT_CODE = 2


class TrainingStopped(RuntimeError):
    """Training stopped itself: a non-finite loss or gradient, out of memory, a full disk.

    Its text says the step, the samples and what to try. Printed and exited like a UserError.
    """

    EXIT_CODE = 3


def print_line(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """print, but no run ends for a line that nobody can read: once a terminal is closed, or the reader of a pipe has
    ended, the stream (None: stdout) goes nowhere."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def progress(what: str, total: int, unit: str, say: Callable[[str], None], has_bar: bool = True) -> Iterator[Callable]:
    """Gives advance(n): n more are done. Shown as a bar on a terminal, of the process that has_bar; else by say, a line
    every PROGRESS_SECONDS."""
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


def one_line(error: BaseException) -> str:
    """An error's text as part of a line."""
    return " ".join(str(error).split())[:300]


@contextmanager
def as_user_error(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an error of these kinds (none named: of any) into a UserError that says what went wrong, and why.

    A UserError goes through as it is, and so does what is no mistake: a full disk, and no memory.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or not isinstance(e, kinds or Exception) or full_disk(e) or is_out_of_memory(e):
            raise
        raise UserError(f"{what}: {_reason(e, what)}") from e


def _reason(error: Exception, said: str) -> str:
    """What went wrong, with the file that an OSError names unless what was `said` names it; errors that are not texts of
    their own, as ValueError's are, with their type."""
    if not getattr(error, "strerror", None):
        return one_line(error) if type(error) is ValueError else f"{type(error).__name__}: {one_line(error)}"
    file = str(error.filename or "")
    return error.strerror if file in said or repr(file) in said else f"{' '.join(file.split())}: {error.strerror}"


@contextmanager
def writing(failure: str, kept: str) -> Iterator[None]:
    """Turns an error while a run writes into a TrainingStopped; also decorates a function that writes.

    failure: what could not be written; kept: what stands nevertheless.
    """
    try:
        yield
    except (OSError, SafetensorError) as e:
        raise TrainingStopped(
            f"{failure}: {_reason(e, failure)}; {kept}; free disk space and run the same command"
        ) from e


def full_disk(error: Exception) -> TrainingStopped | None:
    """What to raise for an error that says that a disk is full (safetensors says so in its text only), else None."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"(os error {errno.ENOSPC})" in str(error):
        return TrainingStopped(f"{one_line(error)}; free disk space and run the same command")
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Of a device or of the host: torch's CPU allocator raises a bare RuntimeError."""
    import torch  # here: run.sh's launcher imports this file, and torch takes seconds

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def not_finite(
    step: int, what: str, value: float, micro_batches: list[list[int]], losses: list[float] | None, lengths, data, ranks
) -> TrainingStopped:
    """What to raise when a step's loss or gradient is NaN or infinite; nothing was updated. Collective.

    micro_batches: this rank's, as indices of samples; losses: of each, None where the gradient alone is not finite, so
    that none can be blamed; lengths: tokens of each sample; data: the TokenDataset.
    """
    mine = [
        f"rank {ranks.rank}, micro-batch {m + 1} of {sum(int(lengths[i]) for i in members):,} tokens: {_some(members, data)}"
        for m, members in enumerate(micro_batches)
        if members and (losses is None or not math.isfinite(losses[m]))
    ]
    named = [place for places in ranks.gather(lambda: mine) for place in places]
    more = f"; and {len(named) - 4} micro-batches more" if len(named) > 4 else ""
    return TrainingStopped(
        f"step {step}: the {what} is {value} and nothing was updated ({'; '.join(named[:4])}{more}). Try a lower "
        f"--learning_rate or, in bfloat16, --dtype float32, or look at those samples; if a checkpoint was written, it stands"
    )


def _some(samples: list[int], data) -> str:
    """The first samples as `file:row, row, file:row`, and how many more there are."""
    rows_of: dict[str, list[str]] = {}
    for i in samples[:8]:
        file, _, row = data.source_of(i).rpartition(":")
        rows_of.setdefault(file, []).append(row)
    named = ", ".join(f"{file}:{', '.join(rows)}" for file, rows in rows_of.items())
    return named + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
