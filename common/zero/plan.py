"""How a model fits on its devices, and how long a step takes: arithmetic alone, from shapes and figures of a card.

The peak memory of a micro-batch of t tokens with u layers that keep their activations is taken as B + t (D + A u).
A rank's time for a step is counted in tokens, in the time that one token's forward and backward passes take: a layer
that recomputes costs a third of its own again, a micro-batch MICRO_BATCH_TOKENS, and an update what of its way over the
host's link is neither beside the last backward pass nor beside the next forward pass.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.zero import host_state
from common.zero.ds_config import offload_devices
from common.zero.opening import LAYERS_BETWEEN
from common.zero.residency import group_sizes

LARGEST_BUDGET = 32768  # tokens; larger rows no longer make the kernels faster
LEAST_TRIED = 1024  # tokens
TRIED_APART = 512  # tokens
HEADROOM = 0.04  # of the device's memory is left free; torch's allocator was seen to hold 1% more than is in use
HOLES = 1.6e9  # bytes that it cannot use, where activations and chunks of the optimizer's state take turns
OF_UPDATE = 12  # bytes a parameter of a chunk: a bfloat16 model's weight, twice, and its master weight, twice
HOST_RESERVE = 4e9  # bytes of host memory for each rank's process, beside the optimizer's state
# What one more micro-batch costs, in tokens' time: weights are read, and sums read and written, once more. Measured for
# 8B on two H200 in rows of 3,000 to 19,000 tokens; both grow with the parameters.
MICRO_BATCH_TOKENS = {"nothing": 1550, "gradients": 800, "all": 400}
BETWEEN_HOSTS = 8  # times as much, where the ranks' links leave the host: some 50 in place of 400 GB/s
EAGER_ACTIVATIONS = 2.8  # times a compiled layer's
SPEED = 0.8  # a step's, of that of a large matrix product alone
SHARES_TRIED = 16
OPENING_USED = 0.9  # of the memory that gradient sums lend to activations
ALIKE = 0.01  # a part of the cost, which is not known better than that


class Workload(NamedTuple):
    """What a run asks of its micro-batches."""

    longest: int  # tokens of the longest sample (pair), the least that the largest micro-batch must hold
    tokens_per_rank: float  # in a step
    budget: int  # tokens that a micro-batch may hold, unless one of the step's samples has more
    is_settled: bool  # by the flag or by the checkpoint that the run continues; else the plan decides
    residency: str  # of the run that wrote that checkpoint; "" for none
    # Of steps, equally likely: tokens of a rank; of the longest sample, and of the longest beside one for each rank.
    steps: tuple[tuple[float, int, int], ...]
    opening: int = 0  # tokens that a step's first micro-batch may hold, if more and settled


class Card(NamedTuple):
    """What a rank has of its machine."""

    free: float  # bytes on the device
    host_free: float  # bytes of host memory
    host_link: float  # bytes a second each way between the two, both ways at once
    flops: float  # FLOP/s of a large bf16 matrix product
    spans_hosts: bool = False


class Shape(NamedTuple):
    """What counts of a model."""

    sizes: list[int]  # elements of each parameter, tied ones once
    layer_numel: int
    layers: int
    hidden: int
    vocab: int
    itemsize: int  # bytes of a parameter
    is_compiled: bool = True
    unmet: int = 0  # elements that a token does not meet: of the experts that it is not routed to
    chosen: int = 0  # experts of a layer that a token is routed to

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    @property
    def num_met(self) -> int:
        return self.numel - self.unmet


class Memory(NamedTuple):
    """Bytes that a rank needs on its device and in host memory."""

    residency: str
    share: float  # of the optimizer's state on the device
    parameters: float  # whole, or the rank's shards
    gathered: float  # layers that are whole only while they run
    gradients: float
    optimizer: float  # master weights and two moments, and the ring
    host: float
    per_token: float  # D
    per_token_and_layer: float  # A
    unseen: float = 0.0  # by dry runs: what an update takes while it runs, holes of the allocator
    lent: float = 0.0  # of the gradients, to the optimizer's state, once they are reduced
    opening: float = 0.0  # of the gradients, to activations of a step's first micro-batch (common/zero/opening.py)

    @property
    def fixed(self) -> float:  # B
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.unseen

    def activations(self, tokens: int, keeping: int) -> float:
        return tokens * (self.per_token + self.per_token_and_layer * keeping)

    def opening_activations(self, tokens: int, keeping: int) -> float:
        """Of a step's first micro-batch, beside what gradient sums hold of them."""
        return self.activations(tokens, keeping) - min(self.opening, tokens * self.per_token_and_layer * keeping)

    def recomputing(self, tokens: float, room: float, layers: int, is_opening: bool = False) -> int:
        """The fewest layers that must recompute for the activations to fit `room` bytes."""
        room_of_layers = room - tokens * self.per_token + (self.opening if is_opening else 0.0)
        can_keep = int(max(0.0, room_of_layers / tokens / self.per_token_and_layer))
        return layers - (min(layers, can_keep) if tokens * self.per_token <= room else 0)

    def largest_opening(self, room: float, keeping: int) -> int:
        """Tokens that fit in a step's first micro-batch."""
        return int(min(room / self.per_token, (room + self.opening) / self.activations(1, keeping)))


class Choice(NamedTuple):
    """Micro-batches. cost: a rank's step, in tokens; infinite if nothing fits."""

    cost: float
    budget: int  # tokens
    recomputing: int  # layers, in the largest micro-batch
    opening: int  # tokens of a step's first one


class Plan(NamedTuple):
    """Where a run's state lies, and its micro-batches (see Choice)."""

    cost: float
    budget: int
    recomputing: int
    opening: int
    memory: Memory
    shape: Shape
    card: Card

    @property
    def residency(self) -> str:
        return self.memory.residency

    def parts(self, tokens: int) -> dict[str, float]:
        """Bytes on the device by what they hold, `unseen` with the optimizer; tokens: of the largest micro-batch."""
        memory, keeping = self.memory, self.shape.layers - self.recomputing
        held = {"parameters": memory.parameters + memory.gathered, "gradients": memory.gradients}
        activations = memory.activations(tokens, keeping)
        if memory.opening and self.opening > self.budget:
            room = self.card.free * (1 - HEADROOM) - memory.fixed
            activations = max(activations, min(room, memory.opening_activations(self.opening, self.shape.layers)))
        return held | {"optimizer": memory.optimizer + memory.unseen, "activations": activations}

    def step_seconds(self) -> float:
        return self.cost * seconds_per_token(self.shape, self.card)

    def bytes_between_hosts(self, workload: Workload, num_hosts: int) -> float:
        """That cross a host's link each way in a step: of all weights, whenever they are gathered, what the other hosts
        hold, and of all gradients, whenever they are reduced, what the others update. No collective needs less."""
        row = max(self.budget, min(longest for _, longest, _ in workload.steps))
        micro_batches = 1 + np.ceil(max(0.0, workload.tokens_per_rank - max(self.opening, row)) / row)
        gathers = 1 if self.residency == "all" else 2 * micro_batches
        reductions = micro_batches if self.residency == "nothing" else 1
        of_element = self.shape.itemsize * gathers + 4 * reductions
        return self.shape.numel * of_element * (1 - 1 / num_hosts)


def shard_groups(shape: Shape, world_size: int, zero: DeepSpeedZeroConfig) -> list[int]:
    """Elements of a rank's groups of shards."""
    return group_sizes([-(-size // world_size) for size in shape.sizes], zero.sub_group_size)


def estimated(shape: Shape, world_size: int, residency: str, share: float, zero: DeepSpeedZeroConfig) -> Memory:
    """From the shape alone; share: of the optimizer's state on the device.

    A compiled layer keeps half of its matrix products' outputs (its parameters over the hidden size) and some five rows
    of the hidden size; outside the layers, the logits and some eight rows. Measured for Llama, within 10%. Experts keep
    a token's row for each that it is routed to, and what each makes of it: measured for Qwen3-MoE, within 6%.
    """
    groups = shard_groups(shape, world_size, zero)
    parameters, state = shape.numel / world_size, sum(groups)
    num_kept = host_state.num_on_device(groups, share)
    of_groups = [host_state.words(size, shape.itemsize) for size in groups]
    on_device, carried = of_groups[:num_kept], of_groups[num_kept:]
    chunk = 4 * host_state.words(host_state.CHUNK_ELEMENTS, shape.itemsize)
    ring = min(4 * sum(carried), host_state.RING_BUFFERS * chunk)
    gathered = min(shape.numel, 3 * shape.layer_numel + zero.prefetch_bucket_size)
    if residency == "all" or world_size == 1:
        parameters, gathered = shape.numel, 0
    if "offload_param" in offload_devices(zero):
        parameters = 0
    gradients = 4 * (state + 2 * zero.reduce_bucket_size if residency == "nothing" else shape.numel)
    of_layers_sums = 4 * shape.layer_numel if residency != "nothing" else 0
    lending = shape.layers - shape.layers // 2  # layers
    lent = host_state.in_chunks(of_layers_sums * (world_size - 1) // world_size, chunk)
    opening = max(0, shape.layers - LAYERS_BETWEEN) * of_layers_sums - max(0, lending - LAYERS_BETWEEN) * lent
    unseen = OF_UPDATE * min(state, host_state.CHUNK_ELEMENTS) if shape.itemsize == 2 else 0.0
    unseen += min(HOLES, 4.0 * sum(carried)) if world_size == 1 else 0.0
    of_layer = (shape.layer_numel - shape.unmet / shape.layers) / shape.hidden / 2 + 5 * shape.hidden
    of_layer *= 1 if shape.is_compiled else EAGER_ACTIVATIONS
    of_layer += 2 * shape.chosen * shape.hidden
    return Memory(
        residency,
        share,
        shape.itemsize * parameters,
        shape.itemsize * gathered,
        gradients,
        4 * sum(on_device) + ring,
        4 * sum(carried),
        shape.itemsize * (shape.vocab + 8 * shape.hidden),
        shape.itemsize * of_layer,
        unseen=unseen,
        lent=lending * lent,
        opening=OPENING_USED * opening if residency == "all" and carried else 0.0,
    )


def seconds_per_token(shape: Shape, card: Card) -> float:
    return 6 * shape.num_met / (SPEED * card.flops)


def exposed_update(memory: Memory, room: float, shape: Shape, card: Card, first: float, last: float) -> float:
    """Seconds of an update for which nothing else runs; first, last: tokens of a step's micro-batches, room: bytes for
    activations.

    State is brought into what gradients lend, on one rank into what activations give up, in the last backward pass;
    where weights are kept whole the next forward pass begins beside the rest.
    """
    of_token = seconds_per_token(shape, card)
    hidden = first * of_token / 3 if memory.residency == "all" else 0.0
    if memory.residency != "nothing":
        hidden += min(last * of_token * 2 / 3, (memory.lent or max(0.0, room)) / card.host_link)
    return max(0.0, memory.host / card.host_link - hidden)


def choose(
    memory: Memory, room: float, shape: Shape, card: Card, workload: Workload, given: int | None = None
) -> Choice:
    """The micro-batches of the least cost that fit `room` bytes.

    Those of a settled budget are the only ones allowed. given: the layers that recompute, None for as few as must. If
    nothing fits, the cost is infinite, the size the smallest, and every (or the given) layer recomputed. A step's first
    micro-batch is as large as fits with no layer (or the given ones) recomputing, where that is more than the others.
    """
    tokens_per_rank, layers = workload.tokens_per_rank, shape.layers
    least = max(LEAST_TRIED, min(longest for _, longest, _ in workload.steps) // LEAST_TRIED * LEAST_TRIED)
    largest = max(least, min(LARGEST_BUDGET, int(1.25 * tokens_per_rank)))
    of_micro_batch: float = MICRO_BATCH_TOKENS[memory.residency] * (BETWEEN_HOSTS if card.spans_hosts else 1)
    of_micro_batch *= shape.numel / shape.num_met  # it grows with all parameters, a token's time with those it meets

    def layers_of(tokens: float, is_opening: bool = False) -> int:
        return memory.recomputing(tokens, room, layers, is_opening) if given is None else given

    def of_step(budget: int, opening: int, of_rank: float, longest: int, longest_of_others: int) -> float:
        budget = max(budget, longest_of_others)
        more = max(0, opening - budget, longest - budget)  # tokens, of the first than of the others
        others = np.ceil(max(0.0, of_rank - budget - more) / budget)
        last = (of_rank - more) / (1 + others) if others else of_rank
        first = of_rank - others * last
        update = exposed_update(memory, room, shape, card, first, last) / seconds_per_token(shape, card)
        recomputed = first * layers_of(first, memory.opening > 0) + others * last * layers_of(last)
        return of_rank + recomputed / layers / 3 + (1 + others) * of_micro_batch + update

    def candidate(budget: int) -> Choice:
        tokens = max(budget, workload.longest, 0 if memory.opening else workload.opening)
        recomputing, cost, opening = layers_of(tokens), np.inf, max(budget, workload.opening)
        if memory.opening and not workload.is_settled:
            most = min(int(tokens_per_rank), memory.largest_opening(room, layers - (given or 0)))
            opening = max(budget, most // TRIED_APART * TRIED_APART)
        if memory.activations(tokens, layers - recomputing) <= room:
            cost = float(np.mean([of_step(budget, opening, *step) for step in workload.steps]))
        return Choice(cost, budget, recomputing, opening)

    budgets = [workload.budget] if workload.is_settled else range(least, largest + 1, TRIED_APART)
    return min(map(candidate, budgets))


def plan_run(
    shape: Shape,
    card: Card,
    workload: Workload,
    world_size: int,
    zero: DeepSpeedZeroConfig,
    residencies: Iterable[str],
    share: float | None = None,
    given: int | None = None,
    headroom: float = HEADROOM,
) -> Plan:
    """The fastest residency, share of state on the device, size of micro-batches and recomputation that fit.

    Of those that are ALIKE, the one with the least host memory. Where nothing fits the cost is infinite, and the plan
    the one that needs the least memory on the device. share, given: None for any.
    """
    plans = []
    for residency in residencies:
        groups = shard_groups(shape, world_size, zero)
        shares = [int(kept) / sum(groups) for kept in np.cumsum([0, *groups])] if share is None else [share]
        for tried in shares[:: max(1, len(shares) // SHARES_TRIED)] + shares[-1:]:
            memory = estimated(shape, world_size, residency, tried, zero)
            room = card.free * (1 - headroom) - memory.fixed
            choice = choose(memory, room, shape, card, workload, given)
            if memory.host and memory.host + HOST_RESERVE > card.host_free:
                choice = choice._replace(cost=np.inf)
            plans.append(Plan(*choice, memory, shape, card))

    least = min(plan.cost for plan in plans)
    if least == np.inf:
        return min(plans, key=lambda plan: plan.memory.fixed)
    fastest = [plan for plan in plans if plan.cost <= (1 + ALIKE) * least]
    return min(fastest, key=lambda plan: (plan.memory.host, plan.cost, -plan.memory.fixed))
