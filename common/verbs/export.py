"""bash run.sh export CHECKPOINT OUT_DIR: the Hugging Face folder of a run's checkpoint; no GPU is needed.

CHECKPOINT is a folder like output/sft/checkpoints/step_00000500.
"""

import os
from pathlib import Path

from common.failures import UserError, print_line


def main(*argv: str) -> int:
    """Raises UserError."""
    if len(argv) != 2:
        raise UserError("write: bash run.sh export CHECKPOINT OUT_DIR")
    os.environ["DS_ACCELERATOR"] = "cpu"
    from common.zero import checkpoint

    checkpoint.export(Path(argv[0]), Path(argv[1]))
    print_line(f"{argv[1]} holds the model of {argv[0]}")
    return 0
