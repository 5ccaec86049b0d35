"""Reference log-probabilities of preference pairs: computed by the starting weights, kept on disk.

CACHE_DIR/reference/KEY/part_DIGEST.safetensors: `pairs` int64 [n], indices into the tokenized data, `logps` float32
[n, 2], summed over the chosen and the rejected completion. The header's metadata holds the digest of both, and a part
is named by its beginning: runs that fill a cache at the same time replace no part of another's. A part is written every
PAIRS_PER_PART pairs, to a temporary file that is renamed: a kill loses one part's work. Any number of ranks reads them.

KEY is a digest of everything that a log-probability depends on: the weights' bytes and config.json, the tokens and
spans of the pairs, dtype, attention kernel, prompt sharing, the source of the code that computes it, and the versions
of the libraries under it.
"""

import time
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

from common.config import DPOConfig
from common.data.dataset import TokenDataset
from common.data.tokens import PreferencePair
from common.failures import as_user_error, progress
from common.files import digest, json_digest, replace_file
from common.model import attention, load, logprobs, packed
from common.model.logprobs import sequence_logps
from common.ranks import Ranks
from common.step import packing
from common.step.packing import pack, pair_documents, pair_lengths, sft_documents
from common.zero.engine import oom_explained

PAIRS_PER_PART = 256
ABANDONED = 3600  # seconds after which nobody writes a temporary file any more
LIBRARIES = ("torch", "transformers", "flash-attn", "flash-attn-4")


def reference_key(weights: str, data_digest: str, config: DPOConfig, kernel: str, device_type: str) -> str:
    """The cache's key, hex. weights: common.files.weights_digest of the reference model."""
    code = [Path(str(m.__file__)).read_bytes() for m in (attention, load, logprobs, packed, packing)]
    versions = [next((d.version for d in distributions(name=name)), None) for name in LIBRARIES]
    parts = [weights, data_digest, config.dtype, kernel, config.share_prompt, device_type, versions]
    return json_digest([*parts, digest(b"".join([*code, Path(__file__).read_bytes()]))])


def reference_pass(
    engine, data, needed: list[int], weights: str, config: DPOConfig, kernel: str, budget: int, ranks: Ranks
) -> tuple[np.ndarray, dict]:
    """Log-probabilities of the `needed` pairs under the engine's present weights, and for the run's record the folder
    that caches them and its parts that hold them: of other parts the last bits may be others, for pairs that were
    computed in other micro-batches.

    float32 [len(data), 2] in host memory, summed over each completion's scored tokens, chosen first; other pairs are
    NaN. The engine must hold the weights that `weights` is the digest of. Collective.
    """
    folder = Path(config.cache_dir) / "reference"
    folder /= reference_key(weights, data.digest, config, kernel, ranks.device.type)
    logps: np.ndarray = np.full((len(data), 2), np.nan, np.float32)
    used = []
    for name, pairs, values in ranks.once(lambda: _read_parts(folder, config.cache_dir)):
        logps[pairs] = values
        used += [name] if np.isin(pairs, needed).any() else []
    missing = sorted(i for i in set(needed) if np.isnan(logps[i]).any())
    num_cached = len(needed) - len(missing)
    ranks.say(f"reference log-probabilities: {num_cached:,} of {len(needed):,} pairs cached in {folder}")
    with progress("reference log-probabilities", len(missing), "pairs", ranks.say, ranks.is_main) as advance:
        for start in range(0, len(missing), PAIRS_PER_PART):
            pairs, started = missing[start : start + PAIRS_PER_PART], time.perf_counter()
            logps[pairs] = compute_logps(engine, data, pairs, config, kernel, budget, ranks, "the reference pass")
            seconds = time.perf_counter() - started
            used.append(ranks.once(lambda: _write_part(folder, np.array(pairs), logps[pairs])))
            advance(len(pairs))
    if missing:  # the first part also compiles, so the last one's speed is told
        speed = pair_lengths(data.pair_lengths[pairs], config.share_prompt).sum() / seconds / ranks.world_size
        ranks.say(f"reference pass: {speed:,.0f} tokens/s a device (last {len(pairs)} pairs)")
    return logps, {"reference_cache": str(folder), "reference_parts": used}


def compute_logps(
    engine, data: TokenDataset, samples: list[int], config, kernel: str, budget: int, ranks: Ranks, what: str
) -> np.ndarray:
    """Of samples, under the engine's present weights, by all ranks together; every rank gets all. Collective.

    float32 [len(samples), 2] of pairs (chosen, rejected), [len(samples), 1] of conversations, summed over the targets.
    budget: tokens of a micro-batch; a longer sample has one of its own. what: this is, for messages.
    """
    lengths, share_prompt, num_sequences = data.lengths, False, 1
    if data.pair_lengths is not None:
        share_prompt, num_sequences = config.share_prompt, 2
        lengths = pair_lengths(data.pair_lengths, share_prompt)
    budget = max(budget, int(lengths[samples].max()))
    plan = packing.plan_step(lengths[samples].tolist(), ranks.world_size, budget)[ranks.rank]
    result = torch.zeros(len(samples), num_sequences, dtype=torch.float32, device=ranks.device)

    def prepared(m: int) -> packing.MicroBatch:
        rows = [data[samples[i]] for i in plan[m]]
        both = [pair_documents(r, share_prompt) if isinstance(r, PreferencePair) else sft_documents(r) for r in rows]
        return pack(both, share_prompt)

    with torch.no_grad(), oom_explained(what, budget, int(lengths.max())) as size:
        for m, micro_batch in packing.one_ahead(prepared, range(len(plan))):
            size.tokens = micro_batch.num_tokens
            values, _ = engine(**packed.model_inputs(micro_batch, kernel, ranks.device))
            rows = attention.to_device(np.array(plan[m], np.int64), ranks.device)
            result[rows] = sequence_logps(values, micro_batch.target_counts).view(len(plan[m]), num_sequences)
    torch.distributed.all_reduce(result)  # each sample was computed by one rank and is zero on the others
    return result.cpu().numpy()


def _read_parts(folder: Path, cache_dir: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, pairs, logps) of every part whose contents are as written; the others are deleted. Raises UserError."""
    parts = []
    with as_user_error(f"--cache_dir {cache_dir} cannot be used", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".part_*.tmp"):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        for path in sorted(folder.glob("part_*.safetensors")):
            with suppress(FileNotFoundError, SafetensorError), safe_open(path, framework="np") as file:
                pairs, logps = file.get_tensor("pairs"), file.get_tensor("logps")
                if file.metadata()["digest"] == digest(pairs.tobytes() + logps.tobytes()):
                    parts.append((path.name, pairs, logps))
                    continue
            path.unlink(missing_ok=True)
    return parts


def _write_part(folder: Path, pairs: np.ndarray, values: np.ndarray) -> str:
    """Its name."""
    contents = digest(pairs.tobytes() + values.tobytes())
    data = safetensors.numpy.save({"pairs": pairs, "logps": values}, {"digest": contents})
    replace_file(folder / (name := f"part_{contents[:16]}.safetensors"), data)
    return name
