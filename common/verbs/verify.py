"""bash run.sh verify OUTPUT_DIR [--step K]: is what a run left behind as it was written?

Compares the digests of every checkpoint. With --step K also runs step K again, from the newest checkpoint before it
(from the start if there is none), on as many ranks, and compares what metrics.jsonl says of it, but for times, bit by
bit. Relative paths of the run's flags start where you stand. Exits 0 if all is as it was, 1 if something is not.
"""

import json
import tempfile
from pathlib import Path

from common.config import as_words
from common.failures import UserError, print_line, progress
from common.files import held, remove_dead
from common.run.curves import read_metrics, read_run_config
from common.verbs.launch import on_request_to_stop, start_run, visible_gpus
from common.verbs.words import before_imports, folders

# What may differ in another run of the same step.
NOT_COMPARED = {"step_seconds", "tokens_per_second", "per_device_tps", "max_memory_gb", "mfu", "compiled_graphs"}
# Of the run that is repeated; the rest of its flags stay. Names that are no flags are left out.
CHANGED = {"resume": "auto", "checkpointing_steps": 10**9, "logging_steps": 1, "export_at_checkpoints": False}
CHANGED |= {"push_to_hub": False, "report_to": "none", "keep_best": None, "export_best": False}


def main(*argv: str) -> int:
    """Returns the exit code. Raises UserError."""
    given, (folder,) = folders("verify OUTPUT_DIR [--step K]", argv, 1, step={"type": int})
    output_dir = Path(folder)
    before_imports(needs_gpu=bool(visible_gpus()))
    from common.zero import checkpoint

    if not (record := read_run_config(folder)):
        raise UserError(f"{output_dir}: there is no run_config.json, as a run writes it")
    checkpoints, num_damaged = checkpoint.newest_first(folder), 0
    print_line(f"{output_dir}: it holds {len(checkpoints) or 'no'} checkpoints")
    for path in checkpoints:
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        with progress(f"reading {path.name}", size // 10**6, "MB") as advance:
            found = checkpoint.fault(path, "", lambda read: advance(read // 10**6))
        print_line(f"{path}: {found or f'whole, {size / 1e9:,.1f} GB'}")
        num_damaged += found is not None
    if given.step is None or num_damaged:
        return int(num_damaged > 0)
    logged = {entry["step"]: entry for entry in read_metrics(output_dir / "metrics.jsonl")}
    if given.step not in logged:
        raise UserError(f"--step {given.step}: {output_dir}/metrics.jsonl has no record of that step")
    for cache in (record, (record.get("evaluation") or {}) if "eval/loss" in logged[given.step] else {}):
        parts = [Path(cache["reference_cache"]) / name for name in cache.get("reference_parts", ())]
        if gone := [part for part in parts if not part.is_file()]:
            why = "computed again, in other micro-batches, they may differ in their last bits, and the step with them"
            raise UserError(f"--step {given.step}: the run's reference log-probabilities are gone ({gone[0]}): {why}")
    before = next((path for path in checkpoints if checkpoint.step_of(path) < given.step), None)
    steps = range(checkpoint.step_of(before) + 1 if before else 1, given.step + 1)
    num_ranks = {round(logged[k]["tokens_per_second"] / logged[k]["per_device_tps"]) for k in steps if k in logged}
    if len(num_ranks) > 1:
        raise UserError(f"--step {given.step}: steps {steps[0]} to {steps[-1]} ran on {sorted(num_ranks)} ranks")
    return repeat(output_dir, record, logged[given.step], before, *num_ranks)


def repeat(output_dir: Path, record: dict, logged: dict, before: Path | None, num_ranks: int) -> int:
    """Runs up to a logged step again in a temporary folder; 0 if all that was logged of it is the same, 1 if not."""
    step = logged["step"]
    print_line(f"running step {step} again on {num_ranks} ranks, from {before or 'the start'}")
    remove_dead(output_dir.glob(".verify_*"))
    with tempfile.TemporaryDirectory(prefix=".verify_", dir=output_dir) as folder, held(Path(folder)):
        if before is not None:
            (Path(folder) / "checkpoints").mkdir()
            (Path(folder) / "checkpoints" / before.name).symlink_to(before.resolve())
        flags = record["config"] | {name: value for name, value in CHANGED.items() if name in record["config"]}
        flags |= {"output_dir": folder, "stop_after_steps": step}
        run = start_run([record["method"].lower(), str(num_ranks), *as_words(flags)])
        on_request_to_stop(run.send_signal)
        for line in run.stdout or ():
            print_line(f"  {line}", end="")
        if code := run.wait():
            return code
        repeated = {entry["step"]: entry for entry in read_metrics(Path(folder) / "metrics.jsonl")}[step]
    names = sorted({*logged} - NOT_COMPARED)  # the repeated run also evaluates, for the step is its last
    both = {name: (json.dumps(logged[name]), json.dumps(repeated.get(name))) for name in names}
    different = [f"step {step}: {name} was {old}, is {new}\n" for name, (old, new) in both.items() if old != new]
    verdict = f"{len(different)} of {len(names)} values differ, compared bit by bit: {', '.join(names)}"
    print_line(f"{''.join(different)}step {step}: {verdict}")
    return int(bool(different))
