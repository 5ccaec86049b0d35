"""What verbs share: the words of their command lines, and what they say before they import what takes seconds."""

import argparse
import os
from collections.abc import Sequence

from common.failures import UserError, print_line


def options(usage: str, argv: Sequence[str], **own: dict) -> tuple[argparse.Namespace, list[str]]:
    """(the verb's own flags; every other word). own: what argparse knows of each. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, nature in own.items():
        parser.add_argument(f"--{name}", **nature)
    try:
        return parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"write: bash run.sh {usage}: {e}") from None


def folders(usage: str, argv: Sequence[str], number: int | None, **own: dict) -> tuple[argparse.Namespace, list[str]]:
    """As options, of a verb whose other words are so many folders, None: one or more."""
    given, words = options(usage, argv, **own)
    if not words or number not in (None, len(words)) or any(word.startswith("-") for word in words):
        raise UserError(f"write: bash run.sh {usage}")
    return given, words


def parsed(verb: str, argv: Sequence[str], **own: dict) -> tuple[str, argparse.Namespace, list[str]]:
    """As options, of a verb that also takes a script's flags: sft or dpo comes first."""
    usage = f"{verb} sft|dpo [N] [flags]"
    if argv[:1] not in (("sft",), ("dpo",)):
        raise UserError(f"write: bash run.sh {usage}")
    return argv[0], *options(usage, argv[1:], **own)


def before_imports(needs_gpu: bool = False) -> None:
    """needs_gpu: else DeepSpeed, which looks for one when it is imported, is told not to."""
    print_line("importing torch, transformers and DeepSpeed")
    if not needs_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
