"""bash run.sh export CHECKPOINT OUT_DIR: the Hugging Face folder of a run's checkpoint; no GPU is needed.

CHECKPOINT is a folder like output/sft/checkpoints/step_00000500.
"""

from pathlib import Path

from common.failures import UserError, print_line
from common.verbs.words import before_imports


def main(*argv: str) -> int:
    """Raises UserError."""
    if len(argv) != 2:
        raise UserError("write: bash run.sh export CHECKPOINT OUT_DIR")
    before_imports()
    from common.zero import checkpoint

    checkpoint.export_shown(Path(argv[0]), Path(argv[1]))
    print_line(f"{argv[1]} holds the model of {argv[0]}")
    return 0
