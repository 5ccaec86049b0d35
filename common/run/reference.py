"""Reference log-probabilities of preference pairs: computed by the starting weights, kept on disk, checked before use.

CACHE_DIR/reference/KEY/part_DIGEST.safetensors: `pairs` int64 [n], indices into the tokenized data, `logps`
float32 [n, 2], summed over the chosen and the rejected completion. The header's metadata holds the digest of
both, and a part is named by its beginning: runs that fill a cache at the same time replace no part of another's.
A part is written every PAIRS_PER_PART pairs, to a temporary file that is renamed, so that a kill loses one
part's work; any number of ranks reads them.

KEY is a digest of everything that a log-probability depends on: the weights' bytes and config.json, the
tokens and spans of the pairs, dtype, attention kernel, prompt sharing, and the source of the code that
computes it. There is no key by name or by path.
"""

import json
import time
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from common.config import DPOConfig
from common.failures import TrainingStopped, UserError, full_disk, one_line, progress, writing
from common.files import digest, file_digest, replace_file, weight_digests
from common.model import attention, logprobs, packed
from common.model import load as model
from common.model.logprobs import sequence_logps
from common.ranks import Ranks
from common.step import packing
from common.step.packing import MicroBatch, one_ahead, pack, pair_documents, plan_step
from common.zero.engine import out_of_memory_explained

PAIRS_PER_PART = 256
PAIRS_CHECKED = 8
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # mean difference per scored token; other weights differ by more


def reference_key(model_folder: str, data_digest: str, config: DPOConfig, kernel: str, ranks: Ranks) -> str:
    """The cache's key, hex. Weights are read once; their digests are remembered by size, times of change and inode."""
    weights = ranks.once_per_node(lambda: weight_digests(model_folder, config.cache_dir))
    files = [*(module.__file__ for module in (attention, logprobs, model, packing)), __file__]
    parts = {
        "weights": weights,
        "config.json": file_digest(Path(model_folder) / "config.json"),
        "data": data_digest,
        "dtype": config.dtype,
        "kernel": kernel,
        "share_prompt": config.share_prompt,
        "device": ranks.device.type,
        "code": digest(b"".join(Path(file).read_bytes() for file in files)),
    }
    return digest(json.dumps(parts, sort_keys=True).encode())


def reference_logps(
    engine, data, needed: list[int], model_folder: str, config: DPOConfig, kernel: str, budget: int, ranks: Ranks
) -> tuple[np.ndarray, str]:
    """Log-probabilities of the `needed` pairs under the engine's present weights, and the folder that caches them.

    float32 [len(data), 2] in host memory, summed over each completion's scored tokens, chosen first; other pairs are
    NaN. The engine must hold the weights of model_folder, whose bytes are part of the cache's key. What the cache
    holds is used once a few of its pairs were computed again and found the same; the rest is computed and added.
    Raises TrainingStopped if the cache disagrees with the weights.
    """
    key = reference_key(model_folder, data.digest, config, kernel, ranks)
    folder = Path(config.cache_dir) / "reference" / key
    logps = torch.full((len(data), 2), torch.nan, device=ranks.device)
    ranks.once(lambda: _read_parts(folder, logps, config.cache_dir))
    torch.distributed.broadcast(logps, 0)
    logps = logps.cpu().numpy()
    cached = [i for i in needed if not np.isnan(logps[i]).any()]
    if cached:
        checked = cached[:: max(1, len(cached) // PAIRS_CHECKED)][:PAIRS_CHECKED]
        _spot_check(engine, data, checked, logps, config, kernel, budget, ranks)
    missing = sorted(set(needed) - set(cached))
    ranks.say(f"reference log-probabilities: {len(cached):,} of {len(needed):,} pairs cached in {folder}")
    with progress("reference log-probabilities", len(missing), "pairs", ranks.say, ranks.is_main) as advance:
        for start in range(0, len(missing), PAIRS_PER_PART):
            pairs, started = missing[start : start + PAIRS_PER_PART], time.perf_counter()
            logps[pairs] = compute_logps(engine, data, pairs, config, kernel, budget, ranks)
            seconds = time.perf_counter() - started
            ranks.once(lambda: _write_part(folder, np.array(pairs), logps[pairs]))
            advance(len(pairs))
    if missing:  # the first part also compiles, so the last one's speed is told
        tokens = sum(packing.pair_length(*data.pair_lengths[i], config.share_prompt) for i in pairs)
        ranks.say(
            f"reference pass: {tokens / seconds / ranks.world_size:,.0f} tokens/s a device (last {len(pairs)} pairs)"
        )
    return logps, str(folder)


def compute_logps(
    engine, data, pairs: list[int], config: DPOConfig, kernel: str, budget: int, ranks: Ranks
) -> np.ndarray:
    """float32 [len(pairs), 2] under the engine's present weights, by all ranks together; every rank gets all."""
    lengths = [packing.pair_length(*data.pair_lengths[i], config.share_prompt) for i in pairs]
    plan = plan_step(lengths, ranks.world_size, budget)[ranks.rank]
    result = torch.zeros(len(pairs), 2, dtype=torch.float32, device=ranks.device)

    def prepared(m: int) -> MicroBatch:
        return pack([pair_documents(data[pairs[i]], config.share_prompt) for i in plan[m]])

    longest = int(packing.pair_length(*data.pair_lengths.T, config.share_prompt).max())
    with torch.no_grad(), out_of_memory_explained("the reference pass", budget, longest) as size:
        for m, micro_batch in one_ahead(prepared, range(len(plan))):
            size.tokens = micro_batch.num_tokens
            values = engine(**packed.model_inputs(micro_batch, kernel, ranks.device))
            rows = attention.to_device(np.array(plan[m], np.int64), ranks.device)
            result[rows] = sequence_logps(values, micro_batch.sequence_targets).view(len(plan[m]), 2)
    torch.distributed.all_reduce(result)  # each pair was computed by one rank and is zero on the others
    return result.cpu().numpy()


def _spot_check(engine, data, pairs, logps, config, kernel, budget, ranks) -> None:
    again = compute_logps(engine, data, pairs, config, kernel, budget, ranks)
    tolerance = TOLERANCE[config.dtype]
    for i, cached, computed in zip(pairs, logps[pairs], again, strict=True):
        lengths = np.array(pair_documents(data[i], share_prompt=True)[0].sequence_targets)
        if not (np.abs(cached - computed) <= tolerance * lengths).all():
            raise TrainingStopped(
                f"the reference cache disagrees with the starting weights on {data.source_of(i)}: cached log-probabilities "
                f"{cached.tolist()}, computed now {computed.tolist()}; delete {config.cache_dir}/reference"
            )


def _read_parts(folder: Path, logps: torch.Tensor, cache_dir: str) -> None:
    """Fills `logps` from every part whose contents are as written, deletes the others."""
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("part_*.safetensors")):
            if (part := _read_part(path)) is None:
                path.unlink(missing_ok=True)
                continue
            pairs, values = part
            logps[torch.from_numpy(pairs)] = torch.from_numpy(values).to(logps.device)
    except OSError as e:
        if full_disk(e) is not None:
            raise
        raise UserError(
            f"--cache_dir {cache_dir}: {e.filename or path} cannot be used: {one_line(e)}; move it, or "
            f"name another --cache_dir"
        ) from e


def _read_part(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with safe_open(path, framework="np") as file:
            pairs, values = file.get_tensor("pairs"), file.get_tensor("logps")
            expected = (file.metadata() or {}).get("digest")
    except (FileNotFoundError, SafetensorError):
        return None
    return (pairs, values) if digest(pairs.tobytes() + values.tobytes()) == expected else None


def _write_part(folder: Path, pairs: np.ndarray, values: np.ndarray) -> None:
    contents = digest(pairs.tobytes() + values.tobytes())
    path = folder / f"part_{contents[:16]}.safetensors"
    data = safetensors.numpy.save({"pairs": pairs, "logps": values}, {"digest": contents})
    with writing(f"{path} could not be written", "the parts before it are kept, another --cache_dir can be named"):
        replace_file(path, data)
