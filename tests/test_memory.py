"""The memory plan: an estimate from the model's shape, a pure choice, and dry runs that confirm it.

pytest tests/test_memory.py
"""

from functools import partial
from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from common.config import SFTConfig
from common.failures import UserError
from common.model.attention import attention_kwargs
from common.model.load import parameter_sizes
from common.step.packing import pack
from common.zero import memory
from common.zero.checkpoint import RunState
from common.zero.memory import confirmed_opening, shape_of, workload_of
from common.zero.plan import HEADROOM, SPEED, Card, Memory, Plan, Workload, choose, estimated

GB = 1e9
NUMEL, LAYER_NUMEL = 8_030_261_248, 218_112_000
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B = models.make_config(**SIZES, num_key_value_heads=8, vocab_size=128256)
ZERO = {"stage": 3, "reduce_bucket_size": 2 * 10**8, "stage3_prefetch_bucket_size": 2 * 10**8, "sub_group_size": 10**8}
ON_2 = Memory("nothing", 1.0, 8 * GB, 2 * GB, 18 * GB, 6 * NUMEL, 0, per_token=0.6e6, per_token_and_layer=1e5)
ANY = Workload(
    4096, tokens_per_rank=42_000, budget=16384, is_settled=False, residency="", steps=((42_000, 4096, 4096),)
)
SHAPE_8B = shape_of(LLAMA_8B, SFTConfig(), True)
CARD = Card(83.5 * GB, 120 * GB, host_link=45 * GB, flops=760e12)  # an 80 GB one


def estimate_8b(residency: str = "nothing", world_size: int = 2, share: float = 1.0, **zero) -> Memory:
    return estimated(SHAPE_8B, world_size, residency, share, DeepSpeedZeroConfig(**ZERO | zero))


def choose_8b(room: float, workload: Workload, given: int | None = None) -> tuple:
    return choose(ON_2, room, SHAPE_8B, CARD, workload, given)


# ------------------------------------------------------------------ the choice


def test_what_is_recomputed_and_how_large_micro_batches_are_follows_from_the_room():
    _, budget, recomputing, _ = choose_8b(400 * GB, ANY)
    assert recomputing == 0 and 42_000 / budget <= 2
    _, budget, *_ = choose_8b(34 * GB, ANY)  # smaller micro-batches come before recomputation
    usual = 42_000 / -(-42_000 // budget)
    assert budget < 16384 and ON_2.recomputing(usual, 34 * GB, 32) <= 3
    _, budget, recomputing, _ = choose_8b(34 * GB, ANY._replace(is_settled=True))
    assert budget == 16384 and 0 < recomputing < 32
    assert ON_2.activations(budget, 32 - recomputing) <= 34 * GB < ON_2.activations(budget, 33 - recomputing)


@pytest.mark.parametrize("room", [4, 14, 24, 44, 64])
@pytest.mark.parametrize("longest", [500, 4096, 9000])
@pytest.mark.parametrize("given", [None, 0, 10, 32])
def test_what_is_chosen_fits_and_so_does_the_longest_sample(room, longest, given):
    cost, budget, recomputing, _ = choose_8b(
        room * GB, ANY._replace(longest=longest, steps=((42_000, longest, longest),)), given
    )
    largest = max(budget, longest)
    assert recomputing == (recomputing if given is None else given)
    if cost < np.inf:
        assert ON_2.activations(largest, 32 - recomputing) <= room * GB
    else:
        keeping = 0 if given is None else 32 - given
        assert (largest, recomputing) == (max(1024, longest), 32 - keeping) and ON_2.activations(
            largest, keeping
        ) > room * GB


def test_a_long_sample_that_few_steps_hold_does_not_slow_the_others():
    """One of 16,384 tokens beside samples of at most 4,096: the others' micro-batches are as without it."""
    without = choose_8b(34 * GB, ANY)
    rare = ANY._replace(longest=16384, steps=((42_000, 4096, 4096),) * 7 + ((42_000, 16384, 4096),))
    cost, budget, recomputing, _ = choose_8b(34 * GB, rare)
    assert cost < 1.01 * without.cost and budget < 1.2 * without.budget
    assert ON_2.activations(16384, 32 - recomputing) <= 34 * GB
    every = choose_8b(34 * GB, rare._replace(steps=((42_000, 16384, 16384),)))
    assert cost < every[0]


def test_a_steps_first_micro_batch_is_larger_where_state_comes_from_host_memory():
    memory = estimate_8b("all", share=0.3)
    keeps = 10 * GB
    assert memory.opening > 0 == estimate_8b("gradients", share=0.3).opening == estimate_8b("all").opening
    _, budget, _, opening = choose(memory, keeps, SHAPE_8B, CARD, ANY)
    assert memory.opening_activations(opening, 32) <= keeps < memory.opening_activations(opening + 1025, 32)
    assert opening >= 2 * budget and memory.recomputing(opening, keeps, 32, is_opening=True) == 0
    slow = CARD._replace(host_link=1e7)  # whatever it hides, the state takes longer
    assert choose(memory, keeps, SHAPE_8B, slow, ANY).cost > choose(memory, keeps, SHAPE_8B, CARD, ANY).cost
    settled = ANY._replace(is_settled=True, budget=2048, opening=5000)
    assert choose(memory, keeps, SHAPE_8B, CARD, settled)[1:] == (2048, memory.recomputing(4096, keeps, 32), 5000)
    assert choose(memory, keeps, SHAPE_8B, CARD, settled._replace(opening=2048)).opening == 2048, "as the flag says"


# ------------------------------------------------------------------ dry runs


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.05, 1.1, 4.0])
def test_a_steps_first_micro_batch_was_seen_to_fit(factor):
    """Activations take `factor` times the estimate."""
    memory, room, runs = estimate_8b("all", share=0.3), 10 * GB, []

    def activations_of(tokens: int) -> float:
        runs.append(tokens)
        of_layers = factor * tokens * memory.per_token_and_layer * 32
        return factor * memory.activations(tokens, 32) - min(memory.opening, of_layers)

    choice = choose(memory, room, SHAPE_8B, CARD, ANY)
    opening, seen = confirmed_opening(choice, memory, room, 32, activations_of)
    assert runs[0] == (choice.budget + choice.opening) // 2
    if factor > 2:
        assert (opening, seen) == (choice.budget, 0.0)
    else:
        assert max(map(activations_of, [*runs])) <= 1.02 * room
        assert opening > choice.budget and seen == activations_of(opening) <= room
    assert factor > 1 or opening == choice.opening


def settled(
    monkeypatch, real, total, shape=LLAMA_8B, estimate=ON_2, allocated=None, device="cuda", workload=ANY, **flags
):
    """choose_micro_batch() on devices of `total` bytes, its dry runs played by real(tokens, keeping layers) -> bytes of
    activations. -> its budget; the layers that recompute at last; (tokens, recomputing) of each dry run; what was said;
    bytes that may be used for activations."""
    runs, said, recomputed, layers = [], [], [], shape.num_hidden_layers
    at_rest = estimate.fixed - estimate.gathered - estimate.unseen
    allocated = at_rest if allocated is None else allocated

    def dry_run(engine, config, kernel, tokens, longest, made_up, ranks):
        runs.append((tokens, recomputed[-1]))
        return allocated + estimate.gathered + real(tokens, layers - recomputed[-1])

    policy = SimpleNamespace(decoder_layers=lambda: [None] * layers, checkpoint_activations=recomputed.append)
    policy.register_forward_pre_hook = lambda hook, with_kwargs: hooks.append(hook)
    hooks: list = []
    ranks = SimpleNamespace(device=torch.device(device), say=said.append, gather=lambda work: [work()])
    monkeypatch.setattr(memory, "_dry_run", dry_run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - allocated, total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocated)
    fractions: list[float] = []  # torch leaves something to NCCL
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: fractions.append(part))
    plan = Plan(0.0, 0, 0, 0, estimate, shape_of(shape, SFTConfig(), True), CARD)
    arguments = SFTConfig(**flags), plan, "varlen", workload, memory.made_up_conversation, ranks
    sums = SimpleNamespace(opens=False, opening=SimpleNamespace(is_open=False))
    engine = SimpleNamespace(module=policy, updater=SimpleNamespace(carrier=SimpleNamespace()), whole_gradients=sums)
    budget, opening = memory.choose_micro_batch(engine, *arguments)
    assert sums.opens == (opening > budget and estimate.opening > 0)
    room = (1 - HEADROOM) * total - allocated - estimate.gathered - estimate.unseen
    assert all(0.94 < fraction < 0.99 for fraction in fractions) and bool(fractions) == (device == "cuda")

    def layers_of(tokens: int) -> int:
        """How many recompute in a micro-batch of the run."""
        for hook in hooks:
            hook(policy, (), {"input_ids": np.zeros((1, tokens))})
        return recomputed[-1]

    largest = recomputed[-1]
    return SimpleNamespace(
        budget=budget, layers=largest, layers_of=layers_of, runs=runs, said=said[-1], room=room, engine=engine
    )


@pytest.mark.parametrize("factor", [0.7, 0.95, 1.0, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": "full"}, {"gradient_checkpointing": 5}])
@pytest.mark.parametrize("is_settled", [False, True])
def test_what_is_seen_corrects_the_choice_before_memory_runs_out(monkeypatch, factor, flags, is_settled):
    """Micro-batches that take `factor` times the estimate, and 1 GB more while the first one compiles, on a device that
    holds 6 GB besides."""
    num_runs, workload = 0, Workload(832, 45_000, 16384, is_settled, "", ((45_000, 800, 800), (45_000, 832, 832)))

    def real(tokens: int, keeping: int) -> float:
        nonlocal num_runs
        num_runs += 1
        return factor * ON_2.activations(tokens, keeping) + (1 * GB if num_runs == 1 else 0)

    allocated = 6 * GB + ON_2.fixed - ON_2.gathered
    seen = settled(monkeypatch, real, 147 * GB, workload=workload, allocated=allocated, **flags)
    of_layer = ON_2.per_token_and_layer * max(seen.budget, workload.longest)
    assert seen.engine.updater.carrier.memory_limit == pytest.approx((1 - HEADROOM) * 147 * GB - 2 * of_layer)
    if is_settled and flags:
        assert not seen.runs and "nothing measured" in seen.said, "nothing is left to choose"
        return
    given = {"full": 32, 5: 5}.get(flags.get("gradient_checkpointing"))
    expected = choose_8b(seen.room / factor, workload, given)
    assert (seen.budget, seen.layers) == expected[1:3]
    last = seen.runs[-1 - (given is None and seen.layers > 0)]  # after it, one of the shortest row is compiled
    assert last == expected[1:3]
    assert f"micro-batches of {seen.budget:,} tokens, {seen.layers} of 32 layers recomputed" in seen.said
    assert len(seen.runs) <= 7
    for tokens in (2, 1024, seen.budget // 2, seen.budget):
        layers = ON_2.recomputing(tokens, seen.room / factor, 32) if given is None else given
        assert seen.layers_of(tokens) == pytest.approx(layers, abs=1)
    used = [factor * ON_2.activations(tokens, 32 - recomputing) for tokens, recomputing in seen.runs]
    assert used[0] <= factor * seen.room / 4 and max(used) <= 1.06 * seen.room
    assert all(later <= 2.1 * max(used[:i]) for i, later in enumerate(used) if i)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.3])
def test_what_no_dry_run_sees_is_left_free(monkeypatch, factor):
    """One card with all state in host memory, which comes into what activations give up, and leaves holes."""
    estimate = estimate_8b("gradients", 1, 0.0)
    seen = settled(monkeypatch, lambda *row: factor * estimate.activations(*row), 84 * GB, estimate=estimate)
    largest = max(factor * estimate.activations(tokens, 32 - recomputing) for tokens, recomputing in seen.runs)
    assert estimate.unseen > 1.6e9 and 0.8 * seen.room < largest
    assert estimate.fixed + largest <= (1 - HEADROOM) * 84 * GB


@pytest.mark.parametrize("held", [0, 6 * GB])
def test_a_tiny_model_takes_one_dry_run_whatever_the_device_holds_besides(monkeypatch, held):
    """The workspaces of matrix products, 70 MB, are not taken for what grows with the tokens."""
    shape = models.make_config()
    estimate = estimated(shape_of(shape, SFTConfig(), True), 1, "all", 1.0, DeepSpeedZeroConfig(**ZERO))

    def real(tokens: int, keeping: int) -> float:
        return 0.07 * GB + estimate.activations(tokens, keeping)

    seen = settled(monkeypatch, real, 10 * GB, shape, estimate, allocated=held + estimate.fixed)
    assert seen.runs == [(seen.budget, 0)] and 42_000 / seen.budget <= 2


@pytest.mark.parametrize("total", [60, 80, 82])
def test_the_smallest_choice_is_taken_though_it_exceeds_what_may_be_used(monkeypatch, total):
    seen = settled(monkeypatch, lambda tokens, keeping: ON_2.activations(tokens, keeping), total * GB)
    assert (4096, 32) in seen.runs and (seen.budget, seen.layers) == (4096, 32)


def test_on_a_cpu_nothing_is_measured_and_the_plan_is_said_by_the_models_shape(monkeypatch):
    estimate = estimate_8b("all")
    seen = settled(monkeypatch, None, 0.0, estimate=estimate, device="cpu", gradient_checkpointing=3)
    assert seen.budget == 16384 and seen.layers == 3 and not seen.runs
    total = estimate.fixed - estimate.unseen + estimate.activations(16384, 29)
    assert f"{total / GB:.1f} by the model's shape, nothing measured" in seen.said


MADE_UP = {
    "conversation": (memory.made_up_conversation, 1, 1),
    "pair": (partial(memory.made_up_pair, share_prompt=False), 2, 2),
    "shared prompt": (partial(memory.made_up_pair, share_prompt=True), 1, 2),
}


@pytest.mark.parametrize("kind", MADE_UP)
@pytest.mark.parametrize("tokens", [16, 17, 18, 19, 300])
def test_a_dry_run_is_of_the_kind_that_the_run_trains_and_every_token_a_target(kind, tokens):
    made_up, num_documents, num_sequences = MADE_UP[kind]
    row = pack([made_up(np.arange(tokens)), made_up(np.arange(tokens))])
    assert row.num_tokens == 2 * tokens and row.document.max() + 1 == 2 * num_documents
    assert len(row.target_counts) == 2 * num_sequences
    assert len(row.target_rows) == 2 * (tokens - num_documents)
    index = attention_kwargs(row, "varlen", torch.device("cpu"))["packed_key_index"]
    assert (index is not None) == (kind == "shared prompt")


# ------------------------------------------------------------------ the estimate and the residency


def test_the_estimate_of_8b_is_what_was_measured():
    """On two H200: 73.1 GB without moments, 139.3 GB with them and 10,240 tokens, when each rank held its own shards of
    the whole parameters twice, and master weights as float32."""
    assert (SHAPE_8B.numel, SHAPE_8B.layer_numel) == (NUMEL, LAYER_NUMEL)
    estimate, more = estimate_8b("all"), (2 + 2) * NUMEL / 2
    assert estimate.fixed - 4 * NUMEL + more == pytest.approx(73.1e9, rel=0.03)
    assert estimate.fixed + estimate.activations(10_240, 32) + more == pytest.approx(139.3e9, rel=0.03)


def test_what_counts_for_memory_is_the_ds_configs():
    plain, none = estimate_8b(), estimate_8b(offload_param=None)
    away = estimate_8b(offload_param={"device": "cpu"})
    small = estimate_8b(reduce_bucket_size=10**8, stage3_prefetch_bucket_size=10**7)
    assert plain.gathered == 2 * (3 * LAYER_NUMEL + 2e8) and plain == none
    assert plain.fixed - small.fixed == pytest.approx(2 * 19e7 + 4 * 2 * 1e8)
    assert plain.fixed - away.fixed == pytest.approx(2 * NUMEL / 2)
    assert estimate_8b(world_size=1).gathered == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_state_counts_where_it_lies_and_at_most_13_bytes_a_parameter_on_the_host(share):
    memory, whole = estimate_8b("all", 2, share), estimate_8b("all", 2)
    ring = 10 * 8 * 2**24 if share < 1 else 0
    assert memory.host + memory.optimizer - ring == pytest.approx(whole.optimizer)
    assert whole.optimizer == pytest.approx(10 * NUMEL / 2, rel=1e-6)  # what rounding lost of masters, and moments
    assert memory.optimizer - ring <= share * whole.optimizer <= memory.optimizer - ring + 10 * 3e8
    assert memory.host + ring <= 13 * NUMEL / 2


def test_layers_that_are_not_compiled_keep_more():
    eager = estimated(SHAPE_8B._replace(is_compiled=False), 2, "all", 1.0, DeepSpeedZeroConfig(**ZERO))
    assert eager.per_token_and_layer == pytest.approx(2.8 * estimate_8b("all").per_token_and_layer)


def placed(monkeypatch, frees, kept="", budget=None, own=None, host=500, workload=ANY, **flags) -> tuple[str, float]:
    """The residency chosen for 8B and ranks with `frees` GB each, `own` being in the file; the state's share there."""
    own = own if isinstance(own, dict) else {"residency": own} if own else {}
    said, given, gather = [], {"zero_optimization": ZERO} | own, lambda work: [work() for _ in frees]
    ranks = SimpleNamespace(
        device=torch.device("cuda"), world_size=len(frees), local_world_size=len(frees), num_hosts=1
    )
    ranks.say, ranks.gather = said.append, gather
    card = CARD._replace(free=min(frees) * GB, host_free=host * GB / len(frees))
    monkeypatch.setattr(memory, "_card", lambda ranks: card)
    workload = workload._replace(budget=budget or 0, is_settled=budget is not None, residency=kept)
    ds_config, plan = memory.choose_residency(given, SFTConfig(**flags), LLAMA_8B, workload, ranks)
    share = plan.memory.share
    assert ds_config == given | {"residency": plan.residency, "optimizer_state": share}
    assert plan.memory == estimate_8b(plan.residency, len(frees), share)
    return plan.residency, share


@pytest.mark.parametrize(
    ("frees", "options", "expected"),
    [
        ([150] * 2, {}, "all"),
        ([150] * 8, {}, "all"),
        ([95] * 2, {}, "all"),
        ([85] * 8, {}, "all"),
        ([40] * 8, {}, "nothing"),
        ([83], {}, "all"),
        ([1000, 40], {}, "nothing"),  # the ranks' least counts
        # a checkpoint's gradients are summed on as they were, unless the file says otherwise
        ([1000] * 2, {"kept": "nothing"}, "nothing"),
        ([80] * 2, {"kept": "all"}, "all"),
        ([1000] * 2, {"kept": "gradients"}, "all"),
        ([1000] * 2, {"kept": "all", "own": "nothing"}, "nothing"),
        ([1000] * 2, {"own": "gradients"}, "gradients"),
    ],
)
def test_what_stays_whole_is_what_memory_leaves_room_for_or_what_was_asked_for(monkeypatch, frees, options, expected):
    assert placed(monkeypatch, frees, **options)[0] == expected


@pytest.mark.parametrize(
    ("frees", "own", "least", "most"),
    [
        ([1000], {}, 1, 1),  # what fits on the device stays there
        ([150] * 4, {}, 1, 1),
        ([83], {}, 0, 0.2),
        ([83] * 2, {}, 0, 0.5),
        ([83] * 8, {}, 0.5, 1),
        ([1000], {"optimizer_state": 0.25}, 0.25, 0.25),
        ([1000] * 2, {"optimizer_state": 0.0}, 0, 0),
    ],
)
def test_state_lies_in_host_memory_where_the_device_has_better_uses_or_where_it_was_put(
    monkeypatch, frees, own, least, most
):
    assert least <= placed(monkeypatch, frees, own=own)[1] <= most


@pytest.mark.parametrize(
    ("frees", "options", "named"),
    [
        ([83], {"host": 40}, ("GPUs", "host memory")),
        ([40], {}, ("GPUs",)),
        (
            [83] * 2,
            {"workload": ANY._replace(longest=300_000, steps=((42_000, 300_000, 4096),))},
            ("--max_seq_length",),
        ),
        ([120], {"own": {"optimizer_state": 1.0}}, ("2 GPUs",)),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_would_fit(monkeypatch, frees, options, named):
    with pytest.raises(UserError) as error:
        placed(monkeypatch, frees, **options)
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in ("parameters", "gradients", "optimizer", "activations"))
    assert all(name in text for name in named), text


def test_another_deepspeed_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setattr("common.zero.residency.deepspeed.__version__", "0.20.0")
    with pytest.raises(UserError, match=r"0\.20\.0"):
        placed(monkeypatch, [1000])


@pytest.mark.parametrize(("limit", "expected"), [("max", 8 * 1024), ("5000", 5000 - 3000 + 500), ("900000", 8 * 1024)])
def test_a_containers_limit_counts_as_host_memory(tmp_path, limit, expected):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       8 kB\n")
    for name, text in (("max", limit), ("current", "3000"), ("stat", "anon 7\ninactive_file 500\n")):
        (group / f"memory.{name}").write_text(text + "\n")
    assert memory.available_host_memory(tmp_path) == expected


def test_a_resume_keeps_its_budget_at_the_same_number_of_ranks():
    def seen(longest, num_ranks, state, **flags):
        ranks = SimpleNamespace(device=torch.device("cpu"), world_size=num_ranks)
        lengths = np.array([longest // 2, longest, 10] * 4)
        config = SFTConfig(**{"global_batch_size": 8} | flags)
        return workload_of(config, lengths, "data.jsonl:2", state, ranks)

    state = RunState(micro_batch_budget=700, world_size=4, residency="nothing")
    of_4, of_2 = (seen(100, num_ranks, state) for num_ranks in (4, 2))
    assert of_4 == Workload(100, 8 * (160 / 3) / 4, 700, True, "nothing", of_4.steps)
    assert of_2[:5] == (100, 8 * (160 / 3) / 2, 4096, False, "")
    for (of_rank, longest, of_others), (twice, *longer) in zip(of_4.steps, of_2.steps, strict=True):
        assert 8 * 10 <= 4 * of_rank <= 8 * 100 and longest in (10, 50, 100) and of_others <= longest
        assert twice == 2 * of_rank and longer[0] == longest and longer[1] >= of_others
    assert np.mean([of_rank for of_rank, *_ in of_4.steps]) == pytest.approx(8 * (160 / 3) / 4, rel=0.2)
    assert seen(100, 2, state, global_batch_size=2).steps[0][2] == 0, "each in a rank's first micro-batch"
    state.opening_budget = 900
    openings = [seen(100, 4, state, **flags).opening for flags in ({}, {"max_tokens_per_micro_batch": 300})]
    assert openings == [900, 300] and seen(100, 2, state).opening == 0
    assert seen(900, 4, state)[2:4] == (700, True)  # --share_prompt false: longer pairs
    assert seen(100, 4, state, max_tokens_per_micro_batch=300)[2:5] == (300, True, "nothing")
    assert seen(100, 4, RunState())[2:5] == (4096, False, "")
    assert seen(100, 4, state, global_batch_size=10**9).tokens_per_rank == 12 * (160 / 3) / 4  # all that there are
    with pytest.raises(UserError, match=r"--max_tokens_per_micro_batch 300 .* 900 .* data.jsonl:2"):
        seen(900, 4, state, max_tokens_per_micro_batch=300)


@pytest.mark.parametrize(
    ("residency", "gathers", "reductions"), [("all", 1, 1), ("gradients", 6, 1), ("nothing", 6, 3)]
)
def test_what_crosses_the_network_is_what_the_other_hosts_hold(residency, gathers, reductions):
    """Weights in bfloat16 before each pass or once a step, gradients in float32, in 3 micro-batches, of 4 hosts."""
    plan = Plan(1.25 * 42_000, 16384, 0, 16384, ON_2._replace(residency=residency), SHAPE_8B, CARD._replace(flops=6e15))
    crossing = plan.bytes_between_hosts(ANY, 4)
    assert crossing == pytest.approx(NUMEL * (2 * gathers + 4 * reductions) * 3 / 4)
    lines = memory._between_hosts(plan, ANY, 4, "eth0")
    step = 1.25 * 42_000 * 6 * NUMEL / (SPEED * 6e15)
    assert f"4 hosts: in each step {crossing / 1e9:,.1f} GB" in lines[0] and lines[0].endswith("by eth0")
    assert [("25 Gb/s" in line, "100 Gb/s" in line) for line in lines[1:]] == [(True, False), (False, True)]
    assert f"up to {crossing / 12.5e9:,.1f} s of each step, which takes {step:,.1f} s" in lines[2]
    slow = plan._replace(card=CARD._replace(flops=1e12))
    assert len(memory._between_hosts(slow, ANY, 4, "eth0")) == 1 and not memory._between_hosts(plan, ANY, 1, "eth0")


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once(tied):
    sizes = dict(vocab_size=100, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    counts, of_layer, unmet = parameter_sizes(models.make_config(tie_word_embeddings=tied, **sizes))
    assert (sum(counts), of_layer, unmet) == (100 * 8 * (1 if tied else 2) + 2 * layer + 8, layer, 0)


def test_a_token_meets_the_experts_that_it_is_routed_to():
    """2 of 4 experts, each of three matrices of 32 x 24, in two layers."""
    config = models.make_config("qwen3_moe")
    counts, _, unmet = parameter_sizes(config)
    assert unmet == 2 * 2 * 3 * 32 * 24
    shape = shape_of(config, SFTConfig(), True)
    assert shape.num_met == sum(counts) - unmet and shape.chosen == 2
