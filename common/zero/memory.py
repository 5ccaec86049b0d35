"""What stays whole on a rank during a step, how large micro-batches are, how many layers recompute their activations.

The peak memory of a micro-batch of t tokens with u layers that keep their activations is taken as B + t (D + A u).
Before the model loads, B, D and A are estimated from its shape, and the fastest residency (common/zero/residency.py)
that fits is taken. Once it is loaded, B is what the device holds, and on a GPU dry micro-batches, whose loss is
multiplied by 0, show what activations really need, until one of the chosen size fits. Their gradients are exact zeros.
"""

import os
import resource
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import TrainConfig
from common.data.tokens import PreferencePair, SFTSample
from common.failures import UserError
from common.model.load import parameter_counts
from common.model.packed import model_inputs
from common.ranks import Ranks
from common.step.packing import Document, pack, pair_documents, sft_documents
from common.zero.checkpoint import RunState
from common.zero.ds_config import RESIDENCY, offload_devices
from common.zero.engine import out_of_memory_explained

LARGEST_BUDGET = 32768  # tokens; larger rows no longer make the kernels faster
LEAST_TRIED = 1024  # tokens
HEADROOM = 0.06  # of the device's memory is left free
# What one more micro-batch costs, in tokens' time. Measured for 8B on two H200; both grow with the parameters.
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
    longest, budget, residency = int(lengths.max()), 0, ""
    if state.world_size == ranks.world_size:  # at another number of ranks nothing keeps a resume bitwise
        budget, residency = state.micro_batch_budget, state.residency
    if config.max_tokens_per_micro_batch != "auto":
        budget = config.max_tokens_per_micro_batch
        if budget < longest:
            raise UserError(f"--max_tokens_per_micro_batch {budget} is less than the {longest} tokens of {longest_at}")
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
    def fixed(self) -> float:  # B
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
    gradients = 4 * (optimizer + 2 * zero.reduce_bucket_size if residency == "nothing" else numel)
    per_token = itemsize * (model_config.vocab_size + 8 * hidden)
    per_token_and_layer = itemsize * (layer_numel / hidden / 2 + 5 * hidden)
    sizes = itemsize * parameters, itemsize * gathered, gradients, 12 * optimizer, per_token, per_token_and_layer
    return Memory(residency, *sizes)


def choose(memory: Memory, room: float, layers: int, workload: Workload, given: int | None = None) -> tuple:
    """(cost, tokens of a micro-batch, layers that recompute) of the least cost whose activations fit `room` bytes.

    The cost is a rank's time for a step, in tokens: a recomputed layer costs a third of its forward and backward passes
    again, a micro-batch MICRO_BATCH_TOKENS; a step takes half a micro-batch more than the quotient, as steps differ. A
    settled budget is the only size allowed. given: the layers that recompute, None for any number.
    If nothing fits, the cost is infinite, the size the smallest, and every (or the given) layer recomputed.
    """
    tokens_per_rank, least = workload.tokens_per_rank, max(workload.longest, LEAST_TRIED)
    budgets = range(least, max(least, min(LARGEST_BUDGET, int(1.25 * tokens_per_rank))) + 1, 1024)

    def candidate(budget: int) -> tuple[float, int, int]:
        can_keep = int(max(0.0, (room / budget - memory.per_token) / memory.per_token_and_layer))
        recomputing = layers - min(layers, can_keep) if given is None else given
        overhead = (tokens_per_rank / budget + 0.5) * MICRO_BATCH_TOKENS[memory.residency]
        fits = memory.activations(budget, layers - recomputing) <= room
        cost = tokens_per_rank * (1 + recomputing / layers / 3) + overhead if fits else np.inf
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
        """Where nothing fits, what needs the least memory is best; of equals, what keeps more whole."""
        room = free * (1 - HEADROOM) - memory.fixed
        return choose(memory, room, layers, workload, given_layers(config, layers))[0], memory.fixed

    estimates = (estimated(model_config, counts, itemsize, ranks.world_size, name, zero) for name in reversed(allowed))
    best = min(estimates, key=cost)
    ranks.say(
        f"residency: {best.residency} (what stays whole on a rank during a step); {counts[0]:,} parameters, "
        f"{free / 1e9:.1f} GB free for each of {ranks.world_size} ranks"
    )
    return ds_config | {"residency": best.residency}, best


def _free_bytes(ranks: Ranks) -> int:
    """Of this rank's GPU; on a CPU its share of half of the host's memory, so that a run is placed alike every time."""
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
    recomputing, how = given or 0, "nothing measured"
    if device.type == "cuda" and not (given is not None and workload.is_settled):
        ranks.say("measuring memory on made-up micro-batches; the first also compiles the layers")
        held = max(ranks.gather(lambda: torch.cuda.memory_allocated(device))) + estimate.gathered
        moments = estimate.optimizer * 2 / 3  # which the first update allocates
        free, total = torch.cuda.mem_get_info(device)
        usable = min(ranks.gather(lambda: free + torch.cuda.memory_reserved(device) - HEADROOM * total))

        def activations_of(tokens: int, recomputing: int) -> float:
            policy.checkpoint_activations(recomputing)
            return _dry_run(engine, kernel, tokens, workload.longest, made_up, ranks) - held

        room = usable - held - moments
        budget, recomputing, activations = confirmed(estimate, room, layers, workload, given, activations_of)
        how = f"{(held + moments + activations) / 1e9:.1f} seen of {usable / 1e9:.1f} usable"
    else:
        policy.checkpoint_activations(recomputing)
        activations = estimate.activations(budget, layers - recomputing)
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

    activations_of(tokens, recomputing) runs one and gives its bytes. The first run should take at most a quarter of the
    room and a later one at most twice what has been seen, so that a surprise shows before memory runs out. If nothing
    fits, the smallest choice is taken.
    """
    room = max(1.0, room)
    estimated_room = room  # in bytes of the estimate: what it may predict for activations that really fill the room
    used, has_compiled = 1 / 8, False  # the largest part of the room that was seen in use
    _, tokens, recomputing = choose(estimate, room, layers, workload, given)
    while True:
        per_token = estimate.activations(1, layers - recomputing)
        size = min(tokens, max(LEAST_TRIED, int(2 * used * estimated_room / per_token)))
        seen = activations_of(size, recomputing)
        if size == tokens and seen <= room:
            return tokens, recomputing, seen
        if not has_compiled:  # which takes memory that no later run needs: the same run once more
            has_compiled = True
            continue
        used = max(used, seen / room)
        estimated_room = min(2 * estimated_room, size * per_token * room / max(1.0, seen))
        last, (_, *choice) = [size, recomputing], choose(estimate, estimated_room, layers, workload, given)
        if choice == last:
            return tokens, recomputing, seen
        tokens, recomputing = choice


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


def _dry_run(engine, kernel: str, tokens: int, longest: int, made_up: Callable, ranks: Ranks) -> float:
    """Peak bytes, on the rank that needs most, of both passes over `tokens` in samples of at most `longest`."""
    ids = np.random.default_rng(0).integers(0, engine.module.lm.config.vocab_size, tokens)
    row = pack([made_up(part) for part in np.array_split(ids, -(-tokens // longest))])
    memory_gb(ranks.device)  # from here on
    with out_of_memory_explained("step 0", tokens, longest) as size:
        size.tokens = row.num_tokens
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(engine(**model_inputs(row, kernel, ranks.device)).sum() * 0.0)
    return max(ranks.gather(lambda: memory_gb(ranks.device) * 1e9))


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process on its GPU since the last call, in GB (10^9 bytes); on a CPU, peak resident set."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 1e9
