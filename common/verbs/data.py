"""What would be trained, without training: no GPU, no weights, one process.

    bash run.sh data sft|dpo [flags of the script] [--show 5] [--row FILE:ROW ...]

Prints the table of rows read, dropped and ignored, the lengths, duplicates, and samples with their trained tokens
marked: `--show` of them, spread over the data, or the rows that `--row` names, as messages name them; of a row that is
not trained, why. Exits with 2 where a run would for its data.
"""

import dataclasses
from pathlib import Path

import numpy as np

from common.config import DPOConfig, SFTConfig, TrainConfig, parse_config
from common.failures import UserError, one_line, print_line
from common.verbs.words import before_imports, parsed


def main(*argv: str) -> int:
    """Returns the exit code. Raises UserError for a mistake in argv, and for data that a run would refuse."""
    own: dict = {"show": {"type": int, "default": 5}, "row": {"nargs": "+", "default": []}}
    method, given, flags = parsed("data", argv, **own)
    config = parse_config(SFTConfig if method == "sft" else DPOConfig, flags)
    before_imports()
    from common.data.cache import prepare_tokens, too_much_dropped
    from common.data.chat_template import resolve_template
    from common.data.dataset import TokenDataset
    from common.data.report import data_table, preview, quality_report
    from common.model import load

    folder = load.find_model(config.model_name_or_path, config.model_revision, load.TOKENIZER_FILES)
    tokenizer = load.load_tokenizer(load.find_tokenizer(config.tokenizer_name_or_path or folder))
    template = resolve_template(config.chat_template, tokenizer)
    ds = TokenDataset(prepare_tokens(method, dataclasses.replace(config, allow_dropped=True), template))
    lines = [data_table(ds), quality_report(ds, template.end_ids())]
    if (Path(folder) / "config.json").is_file():
        lines += load.warnings(template, load.load_config(folder), ds.longest_side())
    shown = np.unique(np.linspace(0, len(ds) - 1, max(0, min(given.show, len(ds)))).astype(int)).tolist()
    samples = [_row(place, ds, config, template) for place in given.row]
    samples = samples or [preview(ds, i, template.tokenizer) for i in shown]
    print_line("\n".join([*lines, *(f"\n{sample}" for sample in samples)]))
    if (lost := too_much_dropped(ds)) and not config.allow_dropped:
        raise UserError(lost)
    return 0


def _row(place: str, ds, config: TrainConfig, template) -> str:
    """What became of the row `file:row` of a TokenDataset. Raises UserError if there is none."""
    from common.data.cache import BlockTokenizer
    from common.data.report import preview
    from common.data.sources import load_source, parse_source

    name, _, number = place.rpartition(":")
    if number.isdecimal():
        if samples := ds.samples_of(place):
            return preview(ds, samples[0], template.tokenizer)
        for rows in (load_source(parse_source(text)) for text in config.dataset_mixer):
            in_file = [i for i, file in enumerate(rows.files) if file == name]
            found = np.flatnonzero(np.isin(rows.file, in_file) & (rows.numbers == int(number)))
            if len(found):
                tokenize = BlockTokenizer(ds.kind, config, template)
                kept = [*tokenize(rows, found)]
                reasons = [f"not one of the {len(rows.indices):,} rows taken"] if kept else tokenize.counts["dropped"]
                return f"{one_line(place)}: not trained: {', '.join(reasons)}"
    raise UserError(f"--row {place}: no such row; write FILE:ROW, as the samples' titles do")
