"""The machine's figures, the plan that follows from them (common/zero/plan.py), and what shows that it fits.

Before the model loads, where its state lies is chosen by the estimate; a run for which nothing fits ends there. Once it
is loaded, B is what the device holds, and on a GPU dry micro-batches, whose loss is multiplied by 0, show what
activations really need, until those of the chosen sizes fit. Their gradients are exact zeros.
"""

import os
import resource
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import TrainConfig
from common.data.tokens import PreferencePair, SFTSample
from common.failures import UserError
from common.model.experts import experts_per_token
from common.model.load import compiles_layers, parameter_sizes, text_config
from common.model.packed import model_inputs
from common.ranks import Ranks, way_to_other_hosts
from common.step.packing import Document, pack, pair_documents, sft_documents
from common.zero import plan as planner
from common.zero.checkpoint import RunState
from common.zero.ds_config import RESIDENCY
from common.zero.engine import oom_explained
from common.zero.host_state import HostMemory, available_host_memory
from common.zero.plan import Card, Choice, Memory, Plan, Shape, Workload, choose, plan_run
from common.zero.residency import require_known_deepspeed

MOST_DRY_RUNS = 8
STEPS_DRAWN = 16
LINKS = (25, 100)  # Gb/s, of which a plan warns
NOT_TORCHS = 0.02  # of the device's memory: for NCCL, which takes some in mid-run and cannot wait for it, and kernels


def workload_of(config: TrainConfig, lengths: np.ndarray, longest_at: str, state: RunState, ranks: Ranks) -> Workload:
    """lengths: int [samples (pairs)], tokens; longest_at: where the longest one is. state: of the run so far.

    Raises UserError for a given budget that does not hold the longest one.
    """
    longest, budget, opening, residency = int(lengths.max()), 0, 0, ""
    if state.world_size == ranks.world_size:  # at another number of ranks nothing keeps a resume bitwise
        budget, opening, residency = state.micro_batch_budget, state.opening_budget, state.residency
    if not isinstance(config.max_tokens_per_micro_batch, str):  # auto
        budget = opening = config.max_tokens_per_micro_batch
        if budget < longest:
            raise UserError(f"--max_tokens_per_micro_batch {budget} is less than the {longest} tokens of {longest_at}")
    default = max(longest, 16384 if ranks.device.type == "cuda" else 4096)
    batch = min(config.global_batch_size, len(lengths))
    drawn = np.random.RandomState(0).choice(lengths, (STEPS_DRAWN, batch))
    others = np.sort(drawn)[:, : max(0, batch - ranks.world_size)].max(1, initial=0)
    of_ranks = drawn.sum(1) / ranks.world_size
    steps = tuple((float(a), int(b), int(c)) for a, b, c in zip(of_ranks, drawn.max(1), others, strict=True))
    tokens_per_rank = float(lengths.mean()) * batch / ranks.world_size
    return Workload(longest, tokens_per_rank, budget or default, budget > 0, residency, steps, opening)


def given_layers(config: TrainConfig, num_layers: int) -> int | None:
    """How many layers `--gradient_checkpointing` has recompute their activations; None for `auto`."""
    value, named = config.gradient_checkpointing, {"auto": None, "none": 0, "full": num_layers}
    return named[value] if isinstance(value, str) else min(value, num_layers)


def shape_of(model_config, config: TrainConfig, is_compiled: bool) -> Shape:
    """Of the model that a config.json describes."""
    sizes, layer_numel, unmet = parameter_sizes(model_config)
    text = text_config(model_config)
    layers, hidden, vocab = text.num_hidden_layers, text.hidden_size, text.vocab_size
    itemsize = getattr(torch, config.dtype).itemsize
    chosen = experts_per_token(text) if unmet else 0
    return Shape(sizes, layer_numel, layers, hidden, vocab, itemsize, is_compiled, unmet, chosen)


def choose_residency(
    ds_config: dict, config: TrainConfig, model_config, workload: Workload, ranks: Ranks, card: Card | None = None
) -> tuple[dict, Plan]:
    """ds_config with its `residency` and `optimizer_state`, and the plan. What its file says stands; a run that
    continues goes on summing gradients as it did, which would else be rounded otherwise. Collective.

    card: of a machine that is not here; None measures this one.

    Raises UserError on a GPU where nothing fits, and for another version of DeepSpeed.
    """
    require_known_deepspeed()
    share = ds_config.get("optimizer_state")
    allowed: tuple[str, ...] = RESIDENCY
    if "residency" in ds_config:
        allowed = (ds_config["residency"],)
    elif workload.residency:
        allowed = ("nothing",) if workload.residency == "nothing" else ("gradients", "all")  # which sum alike
    is_gpu = ranks.device.type == "cuda"
    shape = shape_of(model_config, config, not is_gpu or compiles_layers(config.compile_layers, "cuda", model_config))
    if not is_gpu and share is None:
        share = 1.0  # it is one memory
    is_here = card is None
    card, zero = card or _card(ranks), DeepSpeedZeroConfig(**ds_config["zero_optimization"])

    run = {"card": card, "workload": workload, "world_size": ranks.world_size, "zero": zero, "residencies": allowed}
    planned = partial(plan_run, shape, **run, share=share, given=given_layers(config, shape.layers))
    plan = planned()
    if is_gpu and plan.cost == np.inf and planned(headroom=0).cost == np.inf:
        raise UserError(_does_not_fit(plan, planned, config, workload, ranks))
    way = way_to_other_hosts() if is_here and ranks.num_hosts > 1 else "the network"
    for line in _between_hosts(plan, workload, ranks.num_hosts, way):
        ranks.say(line)
    return ds_config | {"residency": plan.memory.residency, "optimizer_state": plan.memory.share}, plan


def _between_hosts(plan: Plan, workload: Workload, num_hosts: int, way: str) -> list[str]:
    """What of a step crosses the network, and warnings of links that would take more than a tenth of it."""
    gigabytes, step = plan.bytes_between_hosts(workload, num_hosts) / 1e9, plan.step_seconds()
    lines = [f"{num_hosts} hosts: in each step {gigabytes:,.1f} GB go into each host and out of it, by {way}"]
    for link in LINKS:
        if (seconds := gigabytes * 8 / link) > step / 10:
            told = f"up to {seconds:,.1f} s of each step, which takes {step:,.1f} s without"
            lines.append(f"warning: a link of {link} Gb/s would take {told}; a larger --global_batch_size helps")
    return lines if num_hosts > 1 else []


def _does_not_fit(plan: Plan, planned: Callable, config: TrainConfig, workload: Workload, ranks: Ranks) -> str:
    """What is needed, what is free, and the smallest changes with which it would fit."""
    memory, card, per_host = plan.memory, plan.card, ranks.local_world_size
    parts = plan.parts(max(plan.budget, workload.longest))
    changes = []
    for num_ranks in range(ranks.world_size + 1, 65):
        on_host = card._replace(host_free=card.host_free * per_host / min(num_ranks, max(8, per_host)))
        if planned(card=on_host, world_size=num_ranks).cost < np.inf:
            changes.append(f"{num_ranks} GPUs")
            break
    with_host = planned(card=card._replace(host_free=np.inf))
    if with_host.cost < np.inf:
        needed = (with_host.memory.host + planner.HOST_RESERVE) * per_host
        changes.append(f"{needed / 1e9:.0f} GB of host memory free for the {per_host} ranks of this host")
    for sixteenths in range(15, 0, -1):
        longest = max(1, workload.longest * sixteenths // 16)
        steps = tuple((of_rank, min(longest, a), min(longest, b)) for of_rank, a, b in workload.steps)
        shorter = workload._replace(longest=longest, budget=min(workload.budget, longest), steps=steps, opening=0)
        if planned(workload=shorter).cost < np.inf:
            changes.append(f"--max_seq_length {max(1, config.max_seq_length * sixteenths // 16)}")
            break
    return (
        f"this model does not fit on {ranks.world_size} GPUs: each needs "
        + " + ".join(f"{size / 1e9:.1f} GB {name}" for name, size in parts.items())
        + f" = {sum(parts.values()) / 1e9:.1f} GB, free are {card.free / 1e9:.1f} GB; and of host memory "
        f"{memory.host / 1e9:.1f} GB, free are {card.host_free / 1e9:.1f} GB. It would fit with "
        f"{', or '.join(changes) or 'none of: more GPUs, more host memory, a shorter --max_seq_length'}"
    )


# ------------------------------------------------------------------ the machine
def _card(ranks: Ranks) -> Card:
    """The least that any rank has. Collective."""
    if ranks.device.type != "cuda":
        # A share of half of the host's memory, so that a run is placed alike every time.
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 / ranks.local_world_size
        return Card(min(ranks.gather(lambda: free)), np.inf, 1e10, 1e11)
    torch.distributed.barrier()  # for which NCCL takes memory that is not free any more
    ready: list[Callable] = []
    ranks.gather(lambda: ready.append(measuring(ranks.device, ranks.local_world_size)))
    seen = ranks.gather(lambda: ready[0]())
    free, host_free, link, flops = (min(values) for values in zip(*seen, strict=True))
    return Card(free, host_free, link, flops, ranks.world_size > ranks.local_world_size)


def measuring(device: torch.device, local_world_size: int) -> Callable[[], tuple[float, float, float, float]]:
    """Takes memory, and gives what measures: bytes free on the device (before) and in host memory, bytes a second each
    way between them, FLOP/s of a product. Ranks that share a host's memory measure at the same time."""
    free = torch.cuda.mem_get_info(device)[0]
    host = [torch.zeros(2**28, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.zeros(2**28, dtype=torch.uint8, device=device) for _ in range(2)]
    square, back = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), torch.cuda.Stream(device)

    def copy() -> None:
        back.wait_stream(torch.cuda.current_stream(device))
        there[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(back):
            host[1].copy_(there[1], non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(back)

    def seconds(work: Callable[[], object], times: int) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(times):
            work()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3 / times

    def measure() -> tuple[float, float, float, float]:
        link, flops = 2**28 / seconds(copy, 40), 2 * 8192**3 / seconds(lambda: torch.mm(square, square), 5)
        return free, available_host_memory() / local_world_size, link, flops

    copy()
    torch.mm(square, square)
    torch.cuda.synchronize(device)
    return measure


def reserve_host_memory(plan: Plan, ranks: Ranks) -> HostMemory:
    """Host memory for the state that does not lie on this rank's device; pinned beside what follows."""
    num_threads = max(1, min(8, len(os.sched_getaffinity(0)) // ranks.local_world_size))
    return HostMemory(int(plan.memory.host) // 4, ranks.device, num_threads)


# ------------------------------------------------------------------ dry runs
def choose_micro_batch(
    engine, config: TrainConfig, plan: Plan, kernel: str, workload: Workload, made_up: Callable, ranks: Ranks
) -> tuple[int, int]:
    """Sets the layers that recompute, says the plan and returns how many tokens a micro-batch may hold, and a step's
    first one. Collective.

    By dry runs on a GPU, if the flags leave anything open; on a CPU `auto` recomputes nothing. From then on each
    micro-batch has as many layers recompute as its own tokens need. plan: of choose_residency. made_up:
    made_up_conversation or made_up_pair, whichever the run trains.
    """
    policy, device, budget, estimate = engine.module, ranks.device, workload.budget, plan.memory
    opening, sums = max(budget, workload.opening), engine.whole_gradients
    layers = len(policy.decoder_layers())
    given = given_layers(config, layers)
    recomputing, how = given or 0, "nothing measured"

    def opens() -> bool:
        return estimate.opening > 0 and opening > budget

    usable = np.inf
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = free + torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction(ours * (1 - NOT_TORCHS) / total, device)
        usable = min(ranks.gather(lambda: ours * (1 - planner.HEADROOM))) - estimate.unseen
    if device.type == "cuda" and not (given is not None and workload.is_settled):
        ranks.say("measuring memory on made-up micro-batches; the first also compiles the layers")
        held = max(ranks.gather(lambda: torch.cuda.memory_allocated(device))) + estimate.gathered

        def activations_of(tokens: int, recomputing: int, is_opening: bool = False) -> float:
            if is_opening:
                sums.open_as_after_an_update()
            policy.checkpoint_activations(recomputing)
            return _dry_run(engine, config, kernel, tokens, workload.longest, made_up, ranks) - held

        choice, room, activations = confirmed(plan, usable - held, workload, given, activations_of)
        budget, opening = choice.budget, choice.opening
        if opens() and not workload.is_settled:
            keeping = layers - (given or 0)
            of_opening = partial(activations_of, recomputing=given or 0, is_opening=True)
            opening, seen = confirmed_opening(choice, estimate, usable - held, keeping, of_opening)
            activations = max(activations, seen)
        how = f"{(held + activations) / 1e9:.1f} seen of {usable / 1e9:.1f} usable"
        if given is None:
            recomputing = estimate.recomputing(max(budget, workload.longest), room, layers)
            if recomputing:  # short rows may keep all: that is compiled now, and not in the middle of the run
                activations_of(planner.LEAST_TRIED, estimate.recomputing(planner.LEAST_TRIED, room, layers))

            def recompute_by_tokens(module, args, row: dict) -> None:
                tokens = row["input_ids"].shape[1]
                is_opening = estimate.opening > 0 and sums.opening.is_open and tokens <= opening
                module.checkpoint_activations(estimate.recomputing(tokens, room, layers, is_opening))

            policy.register_forward_pre_hook(recompute_by_tokens, with_kwargs=True)  # before each forward pass
    policy.checkpoint_activations(recomputing)
    if device.type == "cuda":
        # Less what a layer's backward pass takes, about twice what it keeps. Beyond `usable` torch gives memory back to
        # the device and takes it again, and waits for every copy that is under way.
        of_layer = estimate.per_token_and_layer * max(budget, opening, workload.longest)
        engine.updater.carrier.memory_limit = usable - 2 * of_layer
    if opens():
        sums.opens = sums.opening.is_open = True
    largest = max(budget, workload.longest)
    seen_at_rest = estimate.fixed - estimate.unseen
    predicted = seen_at_rest + estimate.activations(largest, layers - recomputing)
    if opens():
        predicted = max(predicted, seen_at_rest + estimate.opening_activations(opening, layers - (given or 0)))
    ranks.say(
        f"micro-batches of {budget:,} tokens, {recomputing} of {layers} layers recomputed in one of {largest:,}; "
        + f"a step's first of {opening:,}; " * (opening > budget)
        + f"GB on each rank: {predicted / 1e9:.1f} by the model's shape, {how}"
    )
    return budget, opening


def confirmed_opening(
    choice: Choice, memory: Memory, room: float, keeping: int, activations_of: Callable[[int], float]
) -> tuple[int, float]:
    """(tokens of a step's first micro-batch, bytes of its activations) once it was seen to fit `room`; or those of the
    others, and 0. activations_of(tokens) runs one and gives its bytes; the first run is half of the way up.
    """
    opening, middle = choice.opening, (choice.budget + choice.opening) // 2
    surprise = activations_of(middle) - memory.opening_activations(middle, keeping)
    surprise *= opening / middle
    opening -= -(-int(max(0.0, surprise) / memory.activations(1, keeping)) // planner.TRIED_APART) * planner.TRIED_APART
    while opening > choice.budget + planner.TRIED_APART:
        if (seen := activations_of(opening)) <= room:
            return opening, seen
        opening -= planner.TRIED_APART
    return choice.budget, 0.0


def confirmed(
    plan: Plan, room: float, workload: Workload, given: int | None, activations_of: Callable
) -> tuple[Choice, float, float]:
    """(micro-batches, room in bytes of the estimate, bytes of activations) once a usual and the largest one were seen
    to fit `room`.

    activations_of(tokens, recomputing) runs one and gives its bytes. The first run should take at most a quarter of the
    room and a later one at most twice what has been seen, so that a surprise shows before memory runs out. If nothing
    fits, the smallest choice is taken.
    """
    room, memory, layers = max(1.0, room), plan.memory, plan.shape.layers
    estimated_room = room  # in bytes of the estimate: what it may predict for activations that really fill the room
    used, has_compiled = 1 / 8, False  # the largest part of the room that was seen in use
    seen: dict[tuple[int, int], float] = {}  # of what fits, or is the smallest choice

    def wanted() -> tuple[Choice, list[tuple[int, int]]]:
        choice = choose(memory, estimated_room, plan.shape, plan.card, workload, given)
        settled_opening = 0 if memory.opening else choice.opening  # of a run that had room for it
        sizes = sorted({choice.budget, max(choice.budget, workload.longest, settled_opening)})
        layers_of = [memory.recomputing(n, estimated_room, layers) if given is None else given for n in sizes]
        return choice, list(zip(sizes, layers_of, strict=True))

    choice, targets = wanted()
    for _ in range(MOST_DRY_RUNS):
        unseen = [target for target in targets if target not in seen]
        if not unseen:
            break
        tokens, recomputing = unseen[0]
        per_token = memory.activations(1, layers - recomputing)
        size = min(tokens, max(planner.LEAST_TRIED, int(2 * used * estimated_room / per_token)))
        bytes_seen = activations_of(size, recomputing)
        if size == tokens and bytes_seen <= room:
            seen[tokens, recomputing] = bytes_seen
            continue
        if not has_compiled:  # which takes memory that no later run needs: the same run once more
            has_compiled = True
            continue
        used = max(used, bytes_seen / room)
        estimated_room = min(2 * estimated_room, size * per_token * room / max(1.0, bytes_seen))
        choice, targets = wanted()
        if size == tokens and (size, recomputing) in targets:
            seen[size, recomputing] = bytes_seen
    return choice, estimated_room, max(seen.get(target, 0.0) for target in targets)


def made_up_conversation(ids: np.ndarray) -> list[Document]:
    """A conversation of ids int [n], each a target but the first: no row has more."""
    return sft_documents(SFTSample(ids, np.array([[1, len(ids)]])))


def made_up_pair(ids: np.ndarray, share_prompt: bool) -> list[Document]:
    """A pair that takes as many tokens as ids int [n], half of them prompt, each a target but a document's first."""
    copies = 1 if share_prompt else 2
    num_prompt = len(ids) // (2 * copies)
    num_chosen = (len(ids) - copies * num_prompt) // 2
    ends = num_prompt, num_prompt + num_chosen
    prompt, chosen, rejected = np.split(ids[(copies - 1) * num_prompt :], ends)
    first = 1 - num_prompt  # scored token
    pair = PreferencePair(prompt, chosen, rejected, first, 0 if share_prompt else first)
    return pair_documents(pair, share_prompt)


def _dry_run(
    engine, config: TrainConfig, kernel: str, tokens: int, longest: int, made_up: Callable, ranks: Ranks
) -> float:
    """Peak bytes, on the rank that needs most, of both passes over `tokens` in samples of at most `longest`."""
    ids = np.random.default_rng(0).integers(0, engine.module.config.vocab_size, tokens)
    row = pack([made_up(part) for part in np.array_split(ids, -(-tokens // longest))])
    memory_gb(ranks.device)  # from here on
    with oom_explained("step 0", tokens, longest) as size:
        size.tokens = row.num_tokens
        engine.set_gradient_accumulation_boundary(False)
        inputs = model_inputs(row, kernel, ranks.device, config.router_aux_loss_coef)
        logps, router_loss = engine(**inputs)
        engine.backward((logps.sum() + router_loss) * 0.0)
    return max(ranks.gather(lambda: memory_gb(ranks.device) * 1e9))


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process on its GPU since the last call, in GB (10^9 bytes); on a CPU, peak resident set."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 1e9
