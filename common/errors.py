"""The two ways in which a run ends early on purpose, and their exit codes (INTERFACE: "Exit codes")."""


import errno


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


def full_disk(error: Exception) -> TrainingStopped | None:
    """What to raise for an error that says that a disk is full (safetensors says so in its text only), else None."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or f"(os error {errno.ENOSPC})" in str(error):
        return TrainingStopped(f"{' '.join(str(error).split())}; free disk space and run the same command")
    return None


def not_finite(step: int, what: str, value: float, data, samples: list[int]) -> TrainingStopped:
    """What to raise when a step's loss or gradient is NaN or infinite; nothing was updated.

    data: the TokenDataset; samples: indices of the step's samples.
    """
    named = ", ".join(data.where(i) for i in samples[:4]) + (
        f" and {len(samples) - 4} more" if len(samples) > 4 else ""
    )
    return TrainingStopped(
        f"step {step}: the {what} is {value} and nothing was updated; the step's samples: {named}. Try a lower "
        f"--learning_rate, --dtype float32, or look at those samples; the last checkpoint stands"
    )
