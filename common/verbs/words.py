"""The command line of a verb that also takes a script's flags: `VERB sft|dpo [N] [the verb's flags] [the script's]`."""

import argparse
from collections.abc import Sequence

from common.failures import UserError, as_user_error


def parsed(verb: str, argv: Sequence[str], **own: dict) -> tuple[str, argparse.Namespace, list[str]]:
    """(sft or dpo; the verb's own flags; every other word). own: what argparse knows of each. Raises UserError."""
    if argv[:1] not in (("sft",), ("dpo",)):
        raise UserError(f"write: bash run.sh {verb} sft|dpo [N] [flags]")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, options in own.items():
        parser.add_argument(f"--{name}", **options)
    with as_user_error(verb, argparse.ArgumentError):
        given, others = parser.parse_known_args(argv[1:])
    return argv[0], given, others
