"""Uploads the model of a finished run to the hub; what is there already is not sent again.

    bash run.sh push OUTPUT_DIR [--hub_model_id ENTITY/NAME] [--hub_private true] [--hub_overwrite false]

A flag that is not given is as in the run.
"""

from common.config import TrainConfig, as_words, parse_config
from common.failures import UserError, print_line
from common.run import hub


def main(folder: str = "", *flags: str) -> int:
    if folder.startswith("-") or not folder:
        raise UserError("which folder? write: bash run.sh push OUTPUT_DIR")
    saved = hub.read_record(folder)["config"]
    words = as_words({name: saved[name] for name in hub.FLAGS if name in saved})
    print_line(f"uploaded: {hub.upload(parse_config(TrainConfig, [*words, *flags, '--output_dir', folder]))}")
    return 0
