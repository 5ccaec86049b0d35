"""What stays whole on a rank during a step, how large micro-batches are, how many layers recompute their activations.

The peak memory of a micro-batch of t tokens with u layers that keep their activations is taken as
    B + t (D + A u)
with B what does not grow with the tokens, D what every token costs and A what it costs more in a layer that keeps.

Before the model loads, all three are estimated from its shape, and the fastest residency (common/zero/ds_config.py)
that fits is taken. Once it is loaded, B is what the device holds. On a GPU dry micro-batches, whose loss is multiplied
by 0, then show what the estimated activations really need, until one of the chosen size fits. Gradients get exact zeros
from them.
"""

import gc
import os
import resource
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import TrainConfig
from common.data.tokens import PreferencePair, SFTSample
from common.failures import TrainingStopped, UserError
from common.model.load import parameter_counts
from common.model.packed import model_inputs
from common.ranks import Ranks
from common.step.packing import Document, pack, pair_documents, sft_documents
from common.zero.checkpoint import RunState
from common.zero.ds_config import RESIDENCY, offload_devices
from common.zero.engine import out_of_memory_explained
from common.zero.residency import abandon_backward

LARGEST_BUDGET = 32768  # tokens; larger rows no longer make the kernels faster
HEADROOM = 0.06  # of the device's memory is left free
LEAST_TRIED = 1024  # tokens of any dry run whose choice is not smaller
# What one more micro-batch costs, in tokens' time (which holds for models of any size: both grow with the parameters).
# 8B on two H200, `all` against `nothing`: 0.1 s for each of 5 micro-batches.
MICRO_BATCH_TOKENS = {"nothing": 1300, "gradients": 550, "all": 150}


class Workload(NamedTuple):
    """What a run asks of its micro-batches."""

    longest: int  # tokens of the longest sample (pair), the least that a micro-batch must hold
    tokens_per_rank: float  # in a step
    budget: int  # tokens that a micro-batch may hold
    is_settled: bool  # by the flag or by the checkpoint that the run continues; else choose_micro_batch() decides
    residency: str  # of the run that wrote that checkpoint; "" for none


def workload_of(config: TrainConfig, lengths: np.ndarray, longest_at: str, state: RunState, ranks: Ranks) -> Workload:
    """lengths: int [samples (pairs)], tokens; longest_at: where the longest one is. state: of the run so far.

    Raises UserError for a given budget that does not hold the longest one.
    """
    longest, given = int(lengths.max()), config.max_tokens_per_micro_batch
    budget, residency = state.kept_at(ranks.world_size)
    if given != "auto":
        budget = given
        if budget < longest:
            raise UserError(
                f"--max_tokens_per_micro_batch {budget} is less than the {longest} tokens of {longest_at}; give at "
                f"least {longest}, or lower --max_seq_length"
            )
    default = 16384 if ranks.device.type == "cuda" else 4096
    tokens_per_rank = float(lengths.mean()) * config.global_batch_size / ranks.world_size
    return Workload(longest, tokens_per_rank, max(longest, budget or default), budget > 0, residency)


class Memory(NamedTuple):
    """Bytes that a rank needs on its device; what lies in the host's memory does not count."""

    residency: str
    parameters: float  # whole, or the rank's shards
    gathered: float  # layers that are whole only while they run
    gradients: float
    optimizer: float  # master weights and two moments, in equal parts
    per_token: float  # D
    per_token_and_layer: float  # A

    @property
    def fixed(self) -> float:
        """B."""
        return self.parameters + self.gathered + self.gradients + self.optimizer

    def activations(self, tokens: int, keeping: int) -> float:
        return tokens * (self.per_token + self.per_token_and_layer * keeping)


def estimated(
    model_config, counts: tuple[int, int], itemsize: int, world_size: int, residency: str, zero: DeepSpeedZeroConfig
) -> Memory:
    """From the shape alone. counts: of parameters, all and in a layer, of itemsize bytes each.

    A compiled layer keeps half of its matrix products' outputs (its parameters over the hidden size) and some five rows
    of the hidden size; outside the layers, the logits and some eight rows. Measured for Llama, within 10%.
    """
    (numel, layer_numel), hidden, offloaded = counts, model_config.hidden_size, offload_devices(zero)
    parameters = 0 if "offload_param" in offloaded else numel / world_size
    optimizer = 0 if "offload_optimizer" in offloaded else numel / world_size
    gathered = min(numel, 3 * layer_numel + zero.prefetch_bucket_size)
    if residency == "all" or parameters == numel:
        parameters, gathered = numel, 0
    return Memory(
        residency=residency,
        parameters=itemsize * parameters,
        gathered=itemsize * gathered,
        gradients=4 * (optimizer + 2 * zero.reduce_bucket_size if residency == "nothing" else numel),
        optimizer=12 * optimizer,
        per_token=itemsize * (model_config.vocab_size + 8 * hidden),
        per_token_and_layer=itemsize * (layer_numel / hidden / 2 + 5 * hidden),
    )


def choose(
    memory: Memory, room: float, num_layers: int, workload: Workload, given: int | None = None
) -> tuple[float, int, int]:
    """(cost, tokens of a micro-batch, layers that recompute) of the least cost whose activations fit `room` bytes.

    The cost is a rank's time for a step, in tokens: a recomputed layer costs a third of its forward and backward passes
    again, a micro-batch MICRO_BATCH_TOKENS; a step takes half a micro-batch more than the quotient, as steps differ. A
    settled budget is the only size allowed. given: the layers that recompute, None for any number.
    If nothing fits, the cost is infinite, the size the smallest, and every (or the given) layer recomputed.
    """
    tokens_per_rank, least = workload.tokens_per_rank, max(workload.longest, 1024)
    budgets = range(least, max(least, min(LARGEST_BUDGET, int(1.25 * tokens_per_rank))) + 1, 1024)

    def candidate(budget: int) -> tuple[float, int, int]:
        can_keep = int(max(0.0, (room / budget - memory.per_token) / memory.per_token_and_layer))
        recomputing = num_layers - min(num_layers, can_keep) if given is None else given
        overhead = (tokens_per_rank / budget + 0.5) * MICRO_BATCH_TOKENS[memory.residency]
        fits = memory.activations(budget, num_layers - recomputing) <= room
        cost = tokens_per_rank * (1 + recomputing / num_layers / 3) + overhead if fits else np.inf
        return cost, budget, recomputing

    return min(map(candidate, [workload.budget] if workload.is_settled else budgets))


def given_layers(config: TrainConfig, num_layers: int) -> int | None:
    """How many layers `--gradient_checkpointing` has recompute their activations; None for `auto`."""
    value = config.gradient_checkpointing
    return None if value == "auto" else min({"none": 0, "full": num_layers}.get(value, value), num_layers)


def choose_residency(
    ds_config: dict, config: TrainConfig, model_config, workload: Workload, ranks: Ranks
) -> tuple[dict, Memory]:
    """ds_config with its `residency`, and the estimate for it. What its file says stands; a run that continues goes on
    summing gradients as it did, which would else be rounded otherwise. Collective."""
    allowed = RESIDENCY
    if "residency" in ds_config:
        allowed = (ds_config["residency"],)
    elif workload.residency:
        allowed = ("nothing",) if workload.residency == "nothing" else ("gradients", "all")  # which sum alike
    free, layers = min(ranks.gather(lambda: _free_bytes(ranks))), model_config.num_hidden_layers
    counts, itemsize = parameter_counts(model_config), getattr(torch, config.dtype).itemsize
    zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])

    def cost(memory: Memory) -> tuple[float, float]:
        room = free * (1 - HEADROOM) - memory.fixed
        # Where by the estimate nothing fits, what needs the least memory; of equals, what keeps more whole.
        return choose(memory, room, layers, workload, given_layers(config, layers))[0], memory.fixed

    estimates = (estimated(model_config, counts, itemsize, ranks.world_size, name, zero) for name in reversed(allowed))
    best = min(estimates, key=cost)
    ranks.say(
        f"residency: {best.residency} (what stays whole on a rank during a step); {counts[0]:,} parameters, "
        f"{free / 1e9:.1f} GB free for each of {ranks.world_size} ranks"
    )
    return ds_config | {"residency": best.residency}, best


def _free_bytes(ranks: Ranks) -> int:
    """Memory that this rank can still take: of its GPU; or, on a CPU, its share of half of the host's, whoever uses it
    now, so that a run is placed the same every time."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // ranks.local_world_size


def choose_micro_batch(
    engine, config: TrainConfig, estimate: Memory, kernel: str, workload: Workload, made_up: Callable, ranks: Ranks
) -> int:
    """Sets the layers that recompute, says the plan and returns the micro-batch's tokens. Collective.

    By dry runs on a GPU, if the flags leave anything open; on a CPU `auto` recomputes nothing. estimate: of
    choose_residency. made_up: made_up_conversation or made_up_pair, whichever the run trains.
    """
    policy, device, budget = engine.module, ranks.device, workload.budget
    layers = len(policy.decoder_layers())
    given = given_layers(config, layers)
    recomputing = given or 0
    if device.type != "cuda" or (given is not None and workload.is_settled):
        policy.checkpoint_activations(recomputing)
        activations = estimate.activations(budget, layers - recomputing)
        how = "nothing measured"
    else:
        held = max(ranks.gather(lambda: torch.cuda.memory_allocated(device))) + estimate.gathered
        moments = estimate.optimizer * 2 / 3  # which the first update allocates
        free, total = torch.cuda.mem_get_info(device)
        usable = min(ranks.gather(lambda: free + torch.cuda.memory_reserved(device) - HEADROOM * total))

        def activations_of(tokens: int, recomputing: int) -> float:
            policy.checkpoint_activations(recomputing)
            return _dry_run(engine, kernel, tokens, workload.longest, made_up, estimate.residency, ranks) - held

        budget, recomputing, activations = confirmed(
            estimate, usable - held - moments, layers, workload, given, activations_of
        )
        how = f"{(held + moments + activations) / 1e9:.1f} seen of {usable / 1e9:.1f} usable"
    predicted = estimate.fixed + estimate.activations(budget, layers - recomputing)
    ranks.say(
        f"memory plan, GB on each rank: {(estimate.parameters + estimate.gathered) / 1e9:.1f} parameters, "
        f"{estimate.gradients / 1e9:.1f} gradients, {estimate.optimizer / 1e9:.1f} optimizer, "
        f"{activations / 1e9:.1f} activations; {predicted / 1e9:.1f} by the model's shape, {how}; micro-batches of "
        f"{budget:,} tokens, {recomputing} of {layers} layers recomputed"
    )
    return budget


def confirmed(
    estimate: Memory, room: float, layers: int, workload: Workload, given: int | None, activations_of: Callable
) -> tuple[int, int, float]:
    """(tokens, layers that recompute, bytes of activations) of the first choice whose dry run is seen to fit `room`.

    activations_of(tokens, recomputing) runs one and gives its bytes; infinity if memory ran out, after which the next
    choice needs a tenth less. The first run should take at most a quarter of the room and a later one at most twice
    what has been seen, so that a surprise shows before memory runs out. If nothing fits, the smallest choice is taken.
    Raises TrainingStopped if memory runs out on that too.
    """
    room = max(1.0, room)
    estimated_room = room  # in bytes of the estimate: what it may predict for activations that really fill the room
    used, has_compiled = 1 / 8, False  # the largest part of the room that was seen in use
    choice = choose(estimate, room, layers, workload, given)
    while True:
        _, tokens, recomputing = choice
        per_token = estimate.activations(1, layers - recomputing)
        size = min(tokens, max(LEAST_TRIED, int(2 * used * estimated_room / per_token)))
        seen = activations_of(size, recomputing)
        if size == tokens and seen <= room:
            return tokens, recomputing, seen
        if not has_compiled:  # which takes memory that no later run needs: the same run once more
            has_compiled = True
            continue
        if seen < np.inf:
            used = max(used, seen / room)
            estimated_room = min(2 * estimated_room, size * per_token * room / max(1.0, seen))
        else:
            estimated_room = 0.9 * min(estimated_room, size * per_token)
        choice = choose(estimate, estimated_room, layers, workload, given)
        is_least = choice[1:] == (tokens, recomputing)
        if is_least and seen == np.inf:
            raise TrainingStopped(
                f"step 0: out of memory on {size:,} tokens, and no smaller micro-batch is allowed; use more devices, a "
                f"lower --max_seq_length, --gradient_checkpointing full, or a --ds_config that offloads"
            )
        if is_least and size == tokens:
            return tokens, recomputing, seen


def made_up_conversation(ids: np.ndarray) -> list[Document]:
    """A conversation of ids int [n], each a target but the first: no row has more."""
    return sft_documents(SFTSample(ids, np.array([[1, len(ids)]])))


def made_up_pair(ids: np.ndarray, share_prompt: bool) -> list[Document]:
    """A pair that takes as many tokens as ids int [n], half of them prompt, each a target but a document's first."""
    copies = 1 if share_prompt else 2
    num_prompt = len(ids) // (2 * copies)
    num_chosen = (len(ids) - copies * num_prompt) // 2
    parts = np.split(ids[(copies - 1) * num_prompt :], [num_prompt, num_prompt + num_chosen])
    return pair_documents(PreferencePair(*parts, 1 - num_prompt, 0 if share_prompt else 1 - num_prompt), share_prompt)


def _dry_run(engine, kernel: str, tokens: int, longest: int, made_up: Callable, residency: str, ranks: Ranks) -> float:
    """Peak bytes, of the rank that needed most, of a forward and backward pass over `tokens` tokens in samples of at
    most `longest`; infinite if any rank ran out of memory. Collective.

    If the pass holds collectives, in which the others would wait for a rank that ran out, or starts DeepSpeed's timers,
    which would be left running, that rank stops the run instead.
    """
    policy, device, ran_out = engine.module, ranks.device, False
    can_recover = residency == "all" and not (engine.wall_clock_breakdown() or engine.flops_profiler_enabled())
    ids = np.random.default_rng(0).integers(0, policy.lm.config.vocab_size, tokens)
    row = pack([made_up(part) for part in np.array_split(ids, -(-tokens // longest))])
    memory_gb(device)  # from here on
    try:
        with out_of_memory_explained("step 0", tokens, longest) as size:
            size.tokens = row.num_tokens
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(engine(**model_inputs(row, kernel, device)).sum() * 0.0)
    except TrainingStopped:
        if not can_recover:
            raise
        ran_out = True
    if ran_out:  # not above, where the error still holds what the pass had allocated
        abandon_backward(engine)
        gc.collect()
        torch.cuda.empty_cache()
    return max(ranks.gather(lambda: np.inf if ran_out else memory_gb(device) * 1e9))


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process on its GPU since the last call, in GB (10^9 bytes); on a CPU, peak resident set."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 1e9
