"""How parameters live between micro-batches, how large those are, how many layers recompute their activations.

Before the model loads, from its size, the ranks and the free memory: whether every rank keeps all parameters
whole for a whole optimizer step (`resident`) or gathers a layer when it runs and releases it (`streamed`).
Then, from measured memory:

Peak memory of a micro-batch of t tokens with u layers that keep their activations is taken as
    B + t (D + A u)
with B what does not grow (parameters, gradients, buffers), D what every token costs and A what it costs
more in a layer that keeps. Three dry micro-batches, whose loss is multiplied by 0, give B, D and A; a few
more, the last of the chosen size, confirm the choice before step 1. Gradients get exact zeros from them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.config import TrainConfig
from common.distributed import Ranks
from common.engine import out_of_memory_explained
from common.model import model_inputs, num_parameters
from common.packing import pack, sft_documents
from common.token_cache import SFTSample

LARGEST_BUDGET = 32768  # tokens; larger rows no longer make the kernels faster
OVERHEAD_TOKENS = 700  # what one more micro-batch costs, in tokens' time: 29 ms of 3B on an H200
HEADROOM = 0.06  # of the device's memory is left free
MEASURED_LAYERS = (2, 8)  # u of the dry runs
MEASURED_TOKENS = 4608
RESIDENT_SHARE = 0.1  # of the memory that activations could have; what it saves, two gathers, mostly runs beside compute
STATE_BYTES = 16  # of a parameter, divided over the ranks: master, two moments and gradient in float32
RESIDENCY_KEYS = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")


def is_resident(num_parameters: int, bytes_each: int, free: float, world_size: int) -> bool:
    """Whether whole parameters take at most RESIDENT_SHARE of what the partitioned state leaves of `free` bytes.

    On one rank nothing is gathered from elsewhere (measured on an H200: no difference), so nothing is kept.
    To keep them from forward to backward only would need the same peak memory and save half the gathers.
    """
    room = free * (1 - HEADROOM) - (STATE_BYTES + bytes_each) * num_parameters / world_size
    return world_size > 1 and bytes_each * num_parameters <= RESIDENT_SHARE * room


def place_parameters(ds_config: dict, model_config, dtype: torch.dtype, ranks: Ranks) -> dict:
    """ds_config with `resident` or `streamed` parameters; as it is on a CPU, and where its file says. Collective."""
    zero = ds_config["zero_optimization"]
    if ranks.device.type != "cuda" or zero.keys() & {*RESIDENCY_KEYS, "offload_param", "offload_optimizer"}:
        return ds_config
    free = -max(ranks.gather(lambda: -torch.cuda.mem_get_info(ranks.device)[0]))
    numel = num_parameters(model_config)
    resident = is_resident(numel, dtype.itemsize, free, ranks.world_size)
    ranks.say(f"parameters: {'resident' if resident else 'streamed'}; whole they take {numel * dtype.itemsize / 1e9:.1f} GB, "
              f"{free / 1e9:.1f} GB are free on each of {ranks.world_size} devices")  # fmt: skip
    everything = dict.fromkeys(RESIDENCY_KEYS, 2**62)
    return ds_config | {"zero_optimization": zero | (everything if resident else {})}


@dataclass(frozen=True)
class MemoryModel:
    """Bytes: `fixed` B, `per_token` D, `per_token_and_layer` A, as above; optimizer: moments not yet allocated."""

    fixed: float
    per_token: float
    per_token_and_layer: float
    optimizer: float

    def peak(self, tokens: int, keeping_layers: int) -> float:
        return self.fixed + self.optimizer + tokens * (self.per_token + self.per_token_and_layer * keeping_layers)

    def corrected(self, tokens: int, keeping_layers: int, seen: float) -> "MemoryModel":
        """With what grows with the tokens scaled so that this micro-batch's peak is the larger one that was seen."""
        growing = self.peak(tokens, keeping_layers) - self.peak(0, keeping_layers)
        scale = max(1.0, (seen - self.peak(0, keeping_layers)) / growing)
        return replace(self, per_token=self.per_token * scale, per_token_and_layer=self.per_token_and_layer * scale)


def choose(
    memory: MemoryModel,
    limit: float,
    num_layers: int,
    longest: int,
    tokens_per_rank: float,
    budgets: list[int] | None,
    given: int | None = None,
) -> tuple[int, int]:
    """(tokens of a micro-batch, layers that recompute) of the least time that fits `limit` bytes.

    Time in tokens: a recomputed layer costs a third of its forward and backward passes again, a micro-batch
    OVERHEAD_TOKENS; a step of tokens_per_rank, which steps have more or less of, takes half a micro-batch more than
    their quotient. budgets: the only sizes allowed, None for any. given: the
    layers that recompute, None for any number.
    If nothing fits, the smallest size with every (or the given) layer recomputed: the dry run then says so.
    """
    if budgets is None:
        least = max(longest, 1024)
        budgets = range(least, max(least, min(LARGEST_BUDGET, int(1.25 * tokens_per_rank))) + 1, 1024)
    best = None
    for budget in budgets:
        room = (limit - memory.peak(budget, 0)) / (budget * memory.per_token_and_layer)  # layers that can keep
        if room < (0 if given is None else num_layers - given):
            continue
        recomputing = num_layers - min(num_layers, int(room)) if given is None else given
        num_micro_batches = tokens_per_rank / budget + 0.5
        cost = tokens_per_rank * (1 + recomputing / num_layers / 3) + num_micro_batches * OVERHEAD_TOKENS
        if best is None or cost < best[0]:
            best = (cost, budget, recomputing)
    return (budgets[0], num_layers if given is None else given) if best is None else best[1:]


def confirmed(
    memory: MemoryModel, limit: float, layers: int, tried: float, choose_by: Callable, peak_of: Callable
) -> tuple[int, int, float]:
    """(tokens, layers that recompute, peak bytes seen) of the first choice whose dry run stays within `limit`.

    choose_by(memory) makes a choice, peak_of(tokens, recomputing) runs a micro-batch. A larger peak than was foretold
    corrects the memory model, and so the choice; the smallest choice is taken as it is. What grows with the tokens, of
    which `tried` bytes have been seen, at most doubles at a time, so that a surprise shows before memory runs out.
    """
    while True:
        tokens, recomputing = choose_by(memory)
        keeping = layers - recomputing
        size = min(tokens, int(2 * tried / max(1.0, memory.per_token + memory.per_token_and_layer * keeping)))
        seen = peak_of(size, recomputing)
        tried = max(tried, memory.peak(size, keeping) - memory.peak(0, keeping))
        memory = memory.corrected(size, keeping, seen)
        if size == tokens and (seen <= limit or choose_by(memory) == (tokens, recomputing)):
            return tokens, recomputing, seen


def settle(engine, config: TrainConfig, kernel: str, budget: int, is_kept: bool, longest: int, tokens_per_step: float,
           ranks: Ranks) -> int:  # fmt: skip
    """Sets the layers that recompute and returns the micro-batch's tokens, by measurement on a GPU. Collective.

    budget: what the flag gave, or the default, or (is_kept) the checkpoint's; it is replaced only if the flag is
    `auto` and no checkpoint had chosen. On a CPU nothing is measured: `auto` recomputes nothing.
    """
    policy = engine.module
    layers = len(policy.decoder_layers())
    wanted = {"none": 0, "full": layers, "auto": 0}.get(config.gradient_checkpointing, config.gradient_checkpointing)
    choose_layers = config.gradient_checkpointing == "auto"
    choose_budget = config.max_tokens_per_micro_batch == "auto" and not is_kept
    policy.checkpoint_activations(min(wanted, layers))
    if ranks.device.type != "cuda" or not (choose_layers or choose_budget):
        return budget
    if layers >= MEASURED_LAYERS[1]:
        few, many = MEASURED_LAYERS
        peaks = [_dry_run(engine, policy, kernel, tokens, layers - keeping, longest, ranks)
                 for tokens, keeping in ((MEASURED_TOKENS, few), (MEASURED_TOKENS, few), (MEASURED_TOKENS, many),
                                         (2 * MEASURED_TOKENS, few))][1:]  # fmt: skip
        per_layer = max(1.0, (peaks[1] - peaks[0]) / MEASURED_TOKENS / (many - few))
        slope = (peaks[2] - peaks[0]) / MEASURED_TOKENS
        partition = sum(p.ds_tensor.numel() for p in policy.parameters())
        memory = MemoryModel(peaks[0] - slope * MEASURED_TOKENS, slope - per_layer * few, per_layer, 8 * partition)
        free, total = torch.cuda.mem_get_info(ranks.device)
        usable = free + torch.cuda.memory_reserved(ranks.device) - HEADROOM * total
        limit = -max(ranks.gather(lambda: -usable))
        allowed = None if choose_budget else [budget]
        tokens_per_rank = tokens_per_step / ranks.world_size

        def choose_by(memory: MemoryModel) -> tuple[int, int]:
            given = None if choose_layers else min(wanted, layers)
            return choose(memory, limit, layers, longest, tokens_per_rank, allowed, given)

        def peak_of(budget: int, recomputing: int) -> float:
            return _dry_run(engine, policy, kernel, budget, recomputing, longest, ranks) + memory.optimizer

        budget, recomputing, peak = confirmed(memory, limit, layers, max(peaks) - memory.fixed, choose_by, peak_of)
        predicted = memory.peak(budget, layers - recomputing)
        ranks.say(
            f"memory plan: {memory.fixed / 1e9:.1f} GB for parameters and gradients, {memory.optimizer / 1e9:.1f} GB for "
            f"moments; micro-batches of {budget:,} tokens, {recomputing} of {layers} layers recomputed: "
            f"{predicted / 1e9:.1f} GB predicted, {peak / 1e9:.1f} GB seen, {limit / 1e9:.1f} GB usable"
        )
    return budget


def _dry_run(engine, policy, kernel: str, tokens: int, recomputing: int, longest: int, ranks: Ranks) -> float:
    """Peak bytes, of the rank that needed most, of one forward and backward pass over `tokens` made-up tokens."""
    policy.checkpoint_activations(recomputing)
    rng = np.random.default_rng(0)
    lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
    ids = [rng.integers(0, policy.lm.config.vocab_size, n) for n in lengths]
    row = pack([sft_documents(SFTSample(i, np.array([[0, len(i)]]))) for i in ids])
    torch.cuda.synchronize(ranks.device)
    torch.cuda.reset_peak_memory_stats(ranks.device)
    with out_of_memory_explained(0, tokens, longest) as size:
        size.tokens = row.num_tokens
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(engine(**model_inputs(row, kernel, ranks.device)).sum() * 0.0)
    return max(ranks.gather(lambda: torch.cuda.max_memory_allocated(ranks.device)))
