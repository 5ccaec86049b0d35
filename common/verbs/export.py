"""bash run.sh export CHECKPOINT OUT_DIR: the Hugging Face folder of a run's checkpoint; no GPU is needed.

CHECKPOINT is a folder like output/sft/checkpoints/step_00000500.
"""

from pathlib import Path

from common.failures import print_line
from common.verbs.words import before_imports, folders


def main(*argv: str) -> int:
    """Raises UserError."""
    _, (source, target) = folders("export CHECKPOINT OUT_DIR", argv, 2)
    before_imports()
    from common.zero import checkpoint

    checkpoint.export_shown(Path(source), Path(target))
    print_line(f"{target} holds the model of {source}")
    return 0
