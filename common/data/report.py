"""What of the data is shown before training."""

import sys
from itertools import pairwise

import numpy as np

from common.data.dataset import TokenDataset
from common.data.tokens import SFTSample
from common.failures import one_line, shown
from common.files import digest

BARS = 10
COUNTED = {
    "dropped": "dropped",
    "notes": "not trained as its row says",
    "ignored": "nothing acts on",
    "unrendered_roles": "messages left out, of role",
}


def preview(ds: TokenDataset, index: int, tokenizer) -> str:
    """Sample `index` as text, its target tokens (of a pair: its scored ones) green, or in [[ ]] without a terminal."""
    mark = "\033[32m{}\033[0m" if sys.stdout.isatty() else "[[{}]]"

    def marked(ids, *bounds: int) -> str:
        """bounds: where targets begin and end, by turns."""
        pieces = [shown(tokenizer.decode(ids[start:end])) for start, end in pairwise([0, *bounds, len(ids)])]
        return "".join(mark.format(piece) if i % 2 else piece for i, piece in enumerate(pieces))

    sample, title = ds[index], f"sample {index} ({one_line(ds.source_of(index))})"
    if isinstance(sample, SFTSample):
        return f"{title}:\n{marked(sample.input_ids, *sample.trained_spans.ravel())}"
    chosen = marked(sample.chosen_ids, sample.chosen_start, len(sample.chosen_ids))
    rejected = marked(sample.rejected_ids, sample.rejected_start, len(sample.rejected_ids))
    return f"{title}:\n{marked(sample.prompt_ids)}\n--- chosen:\n{chosen}\n--- rejected:\n{rejected}"


def data_table(ds: TokenDataset) -> str:
    """The stats, a line each: name, value."""
    stats, lines = ds.stats, []
    for source in stats["sources"]:
        known_by = ", ".join(f"{name} {source[name]}" for name in ("revision", "split", "sha256") if name in source)
        rows = f"{source['rows_used']:,} of {source['num_rows']:,} rows, {source['rows_dropped']:,} dropped"
        lines.append((one_line(source["asked_for"]), f"{rows}; {known_by}"))
        lines += [("  file left out", one_line(name)) for name in source.get("left_out", [])[:5]]
    lines.append(("format", ", ".join(f"{form} ({count:,} rows)" for form, count in stats["formats"].items())))
    lines += [(name.replace("_", " "), f"{stats[name]:,}") for name in ("rows_read", "kept", "truncated")]
    for name, title in COUNTED.items():
        if stats[name] or name == "dropped":
            lines.append((title, f"{sum(stats[name].values()):,}"))
        for what, count in stats[name].items():
            lines.append((f"  {one_line(what)}", f"{count:,}; first {one_line(stats['places'][name][what])}"))
    once = "" if ds.pair_lengths is None else ", a pair's prompt once"
    lines += [("tokens" + once, f"{stats['tokens']:,}"), ("target tokens", f"{stats['target_tokens']:,}")]
    lengths = ", ".join(f"{name} {value:,}" for name, value in stats["length_percentiles"].items())
    lines.append(("length" + once, lengths))
    width = min(40, max(len(name) for name, _ in lines))
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in lines)


def losses_of_sources(ds: TokenDataset, share: float) -> list[str]:
    """A line for each source of which more than `share` is dropped, or was cut. ds: with all that was kept."""
    lines = []
    for i, source in enumerate(ds.stats["sources"]):
        num_cut = int(ds.is_truncated[ds.source == i].sum())
        for what, count in (("dropped", source["rows_dropped"]), ("cut to --max_seq_length", num_cut)):
            if count > share * source["rows_used"]:
                lines.append(f"{one_line(source['asked_for'])}: {count:,} of {source['rows_used']:,} rows are {what}")
    return lines


def quality_report(ds: TokenDataset, end_ids: list[int]) -> str:
    """Lengths in BARS bars, exact duplicates, samples cut off, answers without an end. end_ids: tokens that end one."""
    edges = np.unique(np.linspace(0, int(ds.lengths.max()) + 1, BARS + 1).astype(int))
    counts = np.histogram(ds.lengths, edges)[0]
    lines = ["lengths, in tokens:"]
    for start, end, count in zip(edges[:-1], edges[1:] - 1, counts, strict=True):
        lines.append(f"  {start:>8,} to {end:>8,}  {count:>10,}  {'#' * -(-40 * int(count) // int(counts.max()))}")
    lines.append(f"truncated: {ds.stats['truncated']:,} of {len(ds):,}, {ds.stats['truncated'] / len(ds):.1%}")
    first: dict[str, str] = {}
    repeated = []
    for i in range(len(ds)):
        known = digest(b"".join(np.asarray(part).tobytes() + b"|" for part in ds[i]))
        if (place := first.setdefault(known, ds.source_of(i))) != ds.source_of(i):
            repeated.append(f"{ds.source_of(i)} is {place}")
    example = f"; first {one_line(repeated[0])}" if repeated else ""
    lines.append(f"exact duplicates of another row: {len(repeated):,}{example}")
    ends = np.isin(ds.last_tokens(), end_ids)
    lines.append(f"answers without an end token (of {len(ends):,}): {(~ends).sum():,}")
    return "\n".join(lines)
