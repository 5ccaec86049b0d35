"""What of the data is shown before training."""

import sys

from common.data.dataset import TokenDataset


def preview(ds: TokenDataset, index: int, tokenizer) -> str:
    """Sample `index` as text, its target tokens (of a pair: its scored ones) green, or in [[ ]] without a terminal."""
    mark = "\033[32m{}\033[0m" if sys.stdout.isatty() else "[[{}]]"

    def show(ids, spans):
        pieces, done = [], 0
        for start, end in spans:
            pieces += [tokenizer.decode(ids[done:start]), mark.format(tokenizer.decode(ids[start:end]))]
            done = end
        return "".join([*pieces, tokenizer.decode(ids[done:])])

    sample, title = ds[index], f"sample {index} ({ds.source_of(index)})"
    if ds.kind == "sft":
        return f"{title}:\n{show(sample.input_ids, sample.trained_spans.tolist())}"
    chosen = show(sample.chosen_ids, [(sample.chosen_start, len(sample.chosen_ids))])
    rejected = show(sample.rejected_ids, [(sample.rejected_start, len(sample.rejected_ids))])
    return f"{title}:\n{tokenizer.decode(sample.prompt_ids)}\n--- chosen:\n{chosen}\n--- rejected:\n{rejected}"


def data_table(ds: TokenDataset) -> str:
    """The stats, a line each: name, value."""
    stats, lines = ds.stats, []
    for source in stats["sources"]:
        known_by = ", ".join(f"{name} {source[name]}" for name in ("revision", "split", "sha256") if name in source)
        lines.append((source["asked_for"], f"{source['rows_used']:,} of {source['num_rows']:,} rows; {known_by}"))
    lines += [
        ("format", ", ".join(f"{form} ({count:,} rows)" for form, count in stats["formats"].items())),
        *((name.replace("_", " "), f"{stats[name]:,}") for name in ("rows_read", "kept", "truncated")),
        ("dropped", f"{sum(stats['dropped'].values()):,}"),
    ]
    lines += [(f"  {reason}", f"{count:,}") for reason, count in stats["dropped"].items()]
    lines += [(f"  messages of role {role!r} left out", f"{n:,}") for role, n in stats["unrendered_roles"].items()]
    once = "" if ds.pair_lengths is None else ", a pair's prompt once"
    lines += [
        ("tokens" + once, f"{stats['tokens']:,}"),
        ("target tokens", f"{stats['target_tokens']:,}"),
        ("length" + once, ", ".join(f"{name} {value:,}" for name, value in stats["length_percentiles"].items())),
    ]
    width = min(40, max(len(name) for name, _ in lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
