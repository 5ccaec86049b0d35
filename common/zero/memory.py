"""Where gradients and parameters live, how large micro-batches are, how many layers recompute their activations.

Peak memory of a micro-batch of t tokens with u layers that keep their activations is taken as
    B + t (D + A u)
with B what does not grow (parameters, gradients, buffers), D what every token costs and A what it costs
more in a layer that keeps. A step's time follows from how many micro-batches it takes and what is recomputed.

Before the model loads, B, D and A are estimated from its shape, for each way to place gradients (`whole` on every
rank, reduced once a step, or `partitioned` after every micro-batch) and parameters (`resident`, whole on every rank
during a step, or `streamed`, gathered layer by layer): the fastest way that fits is taken. Then four dry
micro-batches, whose loss is multiplied by 0, measure B, D and A (of a model of few layers B alone is measured); a few
more, the last of the chosen size, confirm the choice before step 1. Gradients get exact zeros from them.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from common.config import TrainConfig
from common.data.cache import SFTSample
from common.failures import TrainingStopped, UserError
from common.model.load import parameter_counts
from common.model.packed import model_inputs
from common.ranks import Ranks
from common.step.packing import pack, sft_documents
from common.zero.checkpoint import RunState
from common.zero.ds_config import RESIDENCY, Zero, zero_of
from common.zero.engine import out_of_memory_explained

LARGEST_BUDGET = 32768  # tokens; larger rows no longer make the kernels faster
HEADROOM = 0.06  # of the device's memory is left free
MEASURED_LAYERS = (2, 8)  # u of the dry runs
MEASURED_TOKENS = 4608
LEAST_TRIED = 1024  # tokens of any dry run whose choice is not smaller
# What one more micro-batch costs, in tokens' time (which holds for models of any size: both grow with the parameters).
# 8B on two H200, whole and resident against partitioned and streamed: 0.1 s for each of 5 micro-batches.
GRADIENT_TOKENS = {"whole": 150, "partitioned": 900}
PARAMETER_TOKENS = {"resident": 0, "streamed": 400}


class Placement(NamedTuple):
    """One of each of common.zero.ds_config.RESIDENCY."""

    gradients: str
    parameters: str

    @property
    def overhead(self) -> int:
        """What a micro-batch costs besides its tokens, in tokens' time."""
        return GRADIENT_TOKENS[self.gradients] + PARAMETER_TOKENS[self.parameters]


class Workload(NamedTuple):
    """What a run asks of its micro-batches, in tokens."""

    longest: int  # of the longest sample (pair), the least that a micro-batch must hold
    longest_sequence: int  # of what attends to itself in it
    tokens_per_rank: float  # in a step
    budget: int  # what a micro-batch may hold
    is_settled: (
        bool  # by the flag or by the checkpoint that the run continues; else choose_micro_batch() replaces the budget
    )
    gradients: str  # how that checkpoint summed them, which would be rounded otherwise elsewhere; "" for none


def workload_of(
    config: TrainConfig, lengths: np.ndarray, longest_sequence: int, longest_at: str, state: RunState, ranks: Ranks
) -> Workload:
    """lengths: int [samples (pairs)], tokens; longest_at: where the longest one is. state: of the run so far.

    Raises UserError for a given budget that does not hold the longest one.
    """
    longest, given = int(lengths.max()), config.max_tokens_per_micro_batch
    budget, gradients = state.kept_at(ranks.world_size)
    if given != "auto":
        budget = given
        if longest > budget:
            raise UserError(
                f"--max_tokens_per_micro_batch {budget} is less than the {longest} tokens of {longest_at}; give at "
                f"least {longest}, or lower --max_seq_length"
            )
    default = 16384 if ranks.device.type == "cuda" else 4096
    tokens_per_rank = float(lengths.mean()) * config.global_batch_size / ranks.world_size
    return Workload(longest, longest_sequence, tokens_per_rank, max(longest, budget or default), budget > 0, gradients)


def choose_residency(
    ds_config: dict, config: TrainConfig, model_config, workload: Workload, ranks: Ranks
) -> tuple[dict, Placement]:
    """ds_config with gradients and parameters placed, and how. What its file says of them stands. Collective."""
    allowed = {key: (ds_config[key],) if key in ds_config else values for key, values in RESIDENCY.items()}
    if workload.gradients and "gradients" not in ds_config:
        allowed["gradients"] = (workload.gradients,)
    free = -max(ranks.gather(lambda: -_free_bytes(ranks)))
    counts, zero = parameter_counts(model_config), zero_of(ds_config)
    itemsize, layers = getattr(torch, config.dtype).itemsize, model_config.num_hidden_layers

    def cost(placement: Placement) -> tuple[float, float]:
        memory = estimated(model_config, counts, itemsize, ranks.world_size, placement, zero)
        choice = choose(
            memory, free * (1 - HEADROOM), layers, workload, placement.overhead, given_layers(config, layers)
        )
        return choice.cost, memory.fixed  # where by the estimate nothing fits, what needs the least memory

    placement = min((Placement(*pair) for pair in product(*allowed.values())), key=cost)
    ranks.say(
        f"placement: gradients {placement.gradients}, parameters {placement.parameters}; {counts[0]:,} "
        f"parameters, {free / 1e9:.1f} GB free for each of {ranks.world_size} ranks"
    )
    return ds_config | placement._asdict(), placement


def given_layers(config: TrainConfig, num_layers: int) -> int | None:
    """How many layers `--gradient_checkpointing` has recompute their activations; None for `auto`."""
    value = config.gradient_checkpointing
    return None if value == "auto" else min({"none": 0, "full": num_layers}.get(value, value), num_layers)


def _free_bytes(ranks: Ranks) -> int:
    """Memory that this rank can still take: of its GPU; or, on a CPU, its share of half of the host's, whoever uses it
    now, so that a run is placed the same every time."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // ranks.local_world_size


class State(NamedTuple):
    """Bytes on each rank of what does not grow with the tokens."""

    parameters: float
    gradients: float
    optimizer: float  # masters and moments

    @property
    def moments(self) -> float:
        """The two of three float32 values that the first step allocates."""
        return self.optimizer * 2 / 3


def state_of(counts: tuple[int, int], itemsize: int, world_size: int, placement: Placement, zero: Zero) -> State:
    """What passes through DeepSpeed's buffers included, what is offloaded not. counts: of parameters, all and in a layer,
    of itemsize bytes."""
    numel, layer_numel = counts
    part = numel / world_size
    parameters, gradients = (
        0 if offloads else part for offloads in (zero.offloads_parameters, zero.offloads_optimizer)
    )
    gathered = min(numel, 3 * layer_numel + zero.prefetched) if world_size > 1 or zero.offloads_parameters else 0
    return State(
        parameters=itemsize * (numel if placement.parameters == "resident" else parameters + gathered),
        gradients=4 * (numel if placement.gradients == "whole" else gradients + 2 * zero.reduced),
        optimizer=0 if zero.offloads_optimizer else 12 * part,
    )


def estimated(
    model_config, counts: tuple[int, int], itemsize: int, world_size: int, placement: Placement, zero: Zero
) -> "MemoryModel":
    """The memory model from the shape alone; counts as in state_of.

    A compiled layer keeps half of its matrix products' outputs (its parameters over the hidden size) and some five rows
    of the hidden size; outside the layers, the logits and some eight rows. Measured for Llama, within 10%.
    """
    state, hidden = state_of(counts, itemsize, world_size, placement, zero), model_config.hidden_size
    return MemoryModel(
        fixed=sum(state) - state.moments,
        per_token=itemsize * (model_config.vocab_size + 8 * hidden),
        per_token_and_layer=itemsize * (counts[1] / hidden / 2 + 5 * hidden),
        optimizer=state.moments,
    )


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


class Choice(NamedTuple):
    budget: int  # tokens of a micro-batch
    recomputing: int  # layers
    cost: float  # of a rank's step, in tokens' time; infinite if nothing fits


def choose(
    memory: MemoryModel, limit: float, num_layers: int, workload: Workload, overhead: int, given: int | None = None
) -> Choice:
    """The micro-batch and the layers that recompute of the least time that fits `limit` bytes.

    Time in tokens: a recomputed layer costs a third of its forward and backward passes again, a micro-batch
    `overhead`; a step of workload.tokens_per_rank, which steps have more or less of, takes half a micro-batch more than
    their quotient. A settled budget is the only size allowed. given: the layers that recompute, None for any number.
    If nothing fits, the smallest size with every (or the given) layer recomputed: the dry run then says so.
    """
    tokens_per_rank, least = workload.tokens_per_rank, max(workload.longest, 1024)
    budgets = range(least, max(least, min(LARGEST_BUDGET, int(1.25 * tokens_per_rank))) + 1, 1024)
    if workload.is_settled:
        budgets = [workload.budget]
    best = Choice(budgets[0], num_layers if given is None else given, np.inf)
    for budget in budgets:
        room = (limit - memory.peak(budget, 0)) / (budget * memory.per_token_and_layer)  # layers that can keep
        if room < (0 if given is None else num_layers - given):
            continue
        recomputing = num_layers - min(num_layers, int(room)) if given is None else given
        num_micro_batches = tokens_per_rank / budget + 0.5
        cost = tokens_per_rank * (1 + recomputing / num_layers / 3) + num_micro_batches * overhead
        if cost < best.cost:
            best = Choice(budget, recomputing, cost)
    return best


def confirmed(
    memory: MemoryModel, limit: float, layers: int, tried: float, choose_by: Callable, peak_of: Callable
) -> tuple[int, int, float]:
    """(tokens, layers that recompute, peak bytes seen) of the first choice whose dry run stays within `limit`.

    choose_by(memory) makes a choice, peak_of(tokens, recomputing) runs a micro-batch. A larger peak than was foretold
    corrects the memory model, and so the choice; the smallest choice is taken as it is. What grows with the tokens, of
    which `tried` bytes have been seen, at most doubles at a time, so that a surprise shows before memory runs out. A
    peak is infinite if it did run out; the next choice is then one that by the model needs a tenth less.
    Raises TrainingStopped if there is none.
    """
    while True:
        tokens, recomputing = choose_by(memory)
        keeping = layers - recomputing
        per_token = max(1.0, memory.per_token + memory.per_token_and_layer * keeping)
        size = min(tokens, max(LEAST_TRIED, int(2 * tried / per_token)))
        fixed, foretold = memory.peak(0, keeping), memory.peak(size, keeping)
        seen = peak_of(size, recomputing)
        if seen == np.inf:
            memory = memory.corrected(size, keeping, fixed + 1.1 * (max(limit, foretold) - fixed))
            if choose_by(memory) == (tokens, recomputing):
                raise TrainingStopped(
                    f"step 0: out of memory on a micro-batch of {size:,} tokens, {recomputing} of {layers} layers "
                    f"recomputed, and nothing smaller is left to try; use more devices, a lower --max_seq_length, "
                    f"--gradient_checkpointing full, or a --ds_config that offloads"
                )
            continue
        tried = max(tried, foretold - fixed)
        memory = memory.corrected(size, keeping, seen)
        if size == tokens and (seen <= limit or choose_by(memory) == (tokens, recomputing)):
            return tokens, recomputing, seen


def choose_micro_batch(
    engine, config: TrainConfig, ds_config: dict, kernel: str, workload: Workload, ranks: Ranks
) -> int:
    """Sets the layers that recompute and returns the micro-batch's tokens, and says the plan. Collective.

    By measurement on a GPU, if the flags leave anything open; on a CPU `auto` recomputes nothing. ds_config: `place`'s.
    """
    policy, budget = engine.module, workload.budget
    layers = len(policy.decoder_layers())
    given = given_layers(config, layers)
    recomputing = given or 0
    policy.checkpoint_activations(recomputing)
    counts, placement = parameter_counts(policy.lm.config), Placement(ds_config["gradients"], ds_config["parameters"])
    shape = counts, policy.lm.dtype.itemsize, ranks.world_size, placement, zero_of(ds_config)
    state, memory = state_of(*shape), estimated(policy.lm.config, *shape)
    if ranks.device.type != "cuda" or (given is not None and workload.is_settled):
        peak = memory.peak(budget, layers - recomputing)
        how = f"{peak / 1e9:.1f} by the model's shape, nothing measured"
    else:
        # Else a pass holds collectives, or DeepSpeed's timers are left running by one that was cut off.
        can_recover = placement == Placement("whole", "resident") and not (
            engine.wall_clock_breakdown() or engine.flops_profiler_enabled()
        )

        def peak_of(tokens: int, recomputing: int) -> float:
            return _dry_run(engine, policy, kernel, tokens, recomputing, workload, can_recover, ranks) + state.moments

        if layers >= MEASURED_LAYERS[1]:
            memory, tried = _measured(peak_of, layers, state.moments)
        else:  # too few to tell them apart: what grows is estimated
            memory = replace(memory, fixed=max(ranks.gather(lambda: float(torch.cuda.memory_allocated(ranks.device)))))
            tried = memory.peak(MEASURED_TOKENS, layers) - memory.peak(0, layers)
        free, total = torch.cuda.mem_get_info(ranks.device)
        usable = free + torch.cuda.memory_reserved(ranks.device) - HEADROOM * total
        limit = -max(ranks.gather(lambda: -usable))

        def choose_by(memory: MemoryModel) -> tuple[int, int]:
            return choose(memory, limit, layers, workload, placement.overhead, given)[:2]

        budget, recomputing, peak = confirmed(memory, limit, layers, tried, choose_by, peak_of)
        predicted = memory.peak(budget, layers - recomputing)
        how = f"{peak / 1e9:.1f} seen, {predicted / 1e9:.1f} predicted, {limit / 1e9:.1f} usable"
    ranks.say(
        f"memory plan, GB on each rank: {state.parameters / 1e9:.1f} parameters, {state.gradients / 1e9:.1f} gradients, "
        f"{state.optimizer / 1e9:.1f} optimizer, {(peak - sum(state)) / 1e9:.1f} activations; {how}; micro-batches of "
        f"{budget:,} tokens, {recomputing} of {layers} layers recomputed"
    )
    return budget


def _measured(peak_of: Callable, layers: int, moments: float) -> tuple[MemoryModel, float]:
    """The memory model from dry runs, and the bytes that grow with the tokens of the largest of them. peak_of as in
    `confirmed`. Collective."""
    few, many = MEASURED_LAYERS
    runs = (MEASURED_TOKENS, few), (MEASURED_TOKENS, few), (MEASURED_TOKENS, many), (2 * MEASURED_TOKENS, few)
    peaks = [peak_of(tokens, layers - keeping) - moments for tokens, keeping in runs][1:]
    if max(peaks) == np.inf:
        raise TrainingStopped(
            f"step 0: out of memory on {MEASURED_TOKENS:,} tokens; use more devices, or a --ds_config that offloads"
        )
    per_layer = max(1.0, (peaks[1] - peaks[0]) / MEASURED_TOKENS / (many - few))
    slope = (peaks[2] - peaks[0]) / MEASURED_TOKENS
    fixed = peaks[0] - slope * MEASURED_TOKENS
    return MemoryModel(fixed, slope - per_layer * few, per_layer, moments), max(peaks) - fixed


def _dry_run(
    engine, policy, kernel: str, tokens: int, recomputing: int, workload: Workload, can_recover: bool, ranks: Ranks
) -> float:
    """Peak bytes, of the rank that needed most, of one forward and backward pass over `tokens` made-up tokens.

    Infinite if any rank ran out of memory. can_recover: the pass holds no collective in which the other ranks would
    wait for one that ran out; else that rank stops the run. Collective.
    """
    policy.checkpoint_activations(recomputing)
    rng, longest = np.random.default_rng(0), workload.longest_sequence
    lengths = [longest] * (tokens // longest) + ([tokens % longest] if tokens % longest else [])
    ids = [rng.integers(0, policy.lm.config.vocab_size, n) for n in lengths]
    row = pack([sft_documents(SFTSample(i, np.array([[1, len(i)]]))) for i in ids])
    memory_gb(ranks.device)  # from here on
    ran_out = False
    try:
        with out_of_memory_explained("step 0", tokens, workload.longest) as size:
            size.tokens = row.num_tokens
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(engine(**model_inputs(row, kernel, ranks.device)).sum() * 0.0)
    except TrainingStopped:
        if not can_recover:
            raise
        ran_out = True
    if ran_out:  # not above, where the error still holds what the pass had allocated
        engine.optimizer.exit_backward()
        for param in policy.parameters():
            param.grad = None
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    return max(ranks.gather(lambda: np.inf if ran_out else memory_gb(ranks.device) * 1e9))


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process on its device since the last call, in GB (10^9 bytes); on a CPU its peak resident set."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
