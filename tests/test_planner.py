"""The memory plan: a pure choice, and dry micro-batches that leave no trace in the gradient.

pytest tests/test_planner.py
"""

from types import SimpleNamespace

import models
import numpy as np
import pytest
import torch

from common.config import SFTConfig
from common.failures import TrainingStopped, UserError
from common.model.load import parameter_counts
from common.zero.checkpoint import RunState
from common.zero.ds_config import zero_of
from common.zero.memory import (
    MemoryModel,
    Placement,
    Workload,
    choose,
    choose_micro_batch,
    choose_residency,
    confirmed,
    estimated,
    workload_of,
)

GB = 1e9
DS_CONFIG = {
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 2 * 10**8, "stage3_prefetch_bucket_size": 2 * 10**8}
}
ZERO = zero_of(DS_CONFIG)
PARTITIONED = Placement("partitioned", "streamed")
NUMEL = 8_030_261_248
LLAMA_8B_ON_2 = MemoryModel(fixed=44 * GB, per_token=0.6e6, per_token_and_layer=1e5, optimizer=4 * NUMEL)
FIXED = LLAMA_8B_ON_2.peak(0, 0)
ANY = Workload(
    longest=4096, longest_sequence=4096, tokens_per_rank=42_000, budget=16384, is_settled=False, gradients=""
)


def test_with_room_nothing_is_recomputed_and_a_step_takes_few_micro_batches():
    budget, recomputing, _ = choose(LLAMA_8B_ON_2, 500 * GB, 32, ANY, overhead=700)
    assert recomputing == 0
    assert 42_000 / budget <= 2


def test_with_little_room_smaller_micro_batches_come_before_recomputation():
    budget, recomputing, _ = choose(LLAMA_8B_ON_2, 110 * GB, 32, ANY, overhead=700)
    assert recomputing == 0 and budget < 16384


@pytest.mark.parametrize("limit", [80, 90, 100, 120, 140])
@pytest.mark.parametrize("longest", [500, 4096, 9000])
def test_what_is_chosen_fits_and_holds_the_longest_sample(limit, longest):
    budget, recomputing, _ = choose(LLAMA_8B_ON_2, limit * GB, 32, ANY._replace(longest=longest), overhead=700)
    assert budget >= longest
    if recomputing < 32:
        assert LLAMA_8B_ON_2.peak(budget, 32 - recomputing) <= limit * GB


def test_a_given_budget_is_kept_and_only_the_layers_are_chosen():
    budget, recomputing, _ = choose(LLAMA_8B_ON_2, 110 * GB, 32, ANY._replace(is_settled=True), overhead=700)
    assert budget == 16384 and 0 < recomputing < 32
    assert LLAMA_8B_ON_2.peak(budget, 32 - recomputing) <= 110 * GB
    assert LLAMA_8B_ON_2.peak(budget, 32 - recomputing + 1) > 110 * GB


def test_nothing_fits_gives_the_smallest_with_all_layers_recomputed():
    assert choose(LLAMA_8B_ON_2, 70 * GB, 32, ANY, 700) == (4096, 32, float("inf"))


def settled(
    monkeypatch,
    shape,
    real,
    total: float,
    allocated: float = 0.0,
    world_size: int = 2,
    ds_config: dict = DS_CONFIG,
    placement: Placement = PARTITIONED,
    workload: Workload = ANY,
    device: str = "cuda",
    dtype=torch.bfloat16,
    **flags,
):
    """choose_micro_batch() for a model of this shape, its dry runs played by real(tokens, keeping layers) -> bytes without moments, on
    devices of `total` bytes. -> its budget and the layers that recompute at last; (tokens, recomputing) and workload of each
    dry run; what was said."""
    runs, demands, said, recomputed, layers = [], [], [], [], shape.num_hidden_layers

    def dry_run(engine, policy, kernel, tokens, recomputing, workload, can_recover, ranks):
        runs.append((tokens, recomputing))
        demands.append(workload)
        return real(tokens, layers - recomputing)

    policy = SimpleNamespace(
        decoder_layers=lambda: [None] * layers,
        checkpoint_activations=recomputed.append,
        lm=SimpleNamespace(dtype=dtype, config=shape),
    )
    ranks = SimpleNamespace(
        device=torch.device(device), world_size=world_size, say=said.append, gather=lambda work: [work()]
    )
    monkeypatch.setattr("common.zero.memory._dry_run", dry_run)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - allocated, total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: allocated)
    ds_config = ds_config | placement._asdict()
    budget = choose_micro_batch(
        SimpleNamespace(module=policy), SFTConfig(**flags), ds_config, "varlen", workload, ranks
    )
    layers_at_last = runs[-1][1] if runs else recomputed[-1]
    return SimpleNamespace(budget=budget, layers=layers_at_last, runs=runs, demands=demands, said=said[-1])


def real_8b(tokens: int, keeping: int) -> float:
    return LLAMA_8B_ON_2.peak(tokens, keeping) - LLAMA_8B_ON_2.optimizer


@pytest.mark.parametrize(
    ("flags", "is_settled", "expected"),
    [
        ({}, False, (14336, 0)),  # 56.5 GB for 3.8 MB a token
        ({"gradient_checkpointing": "full"}, False, (32768, 32)),
        ({"gradient_checkpointing": 5}, False, (16384, 5)),  # 3.3 MB a token
        ({}, True, (16384, 4)),  # 46.7 GB for layers of 1.64 GB
        ({"gradient_checkpointing": 9}, True, (16384, 9)),
    ],
)
def test_what_is_measured_settles_what_the_flags_leave_open(monkeypatch, flags, is_settled, expected):
    """The dry runs are played by a memory model, on a device of 141 GB with 8B parameters on 2 ranks."""
    real, workload = LLAMA_8B_ON_2, Workload(832, 832, 45_000, 16384, is_settled, "")
    seen = settled(
        monkeypatch, models.make_config(**LLAMA_8B), real_8b, 141 * GB, real.fixed, workload=workload, **flags
    )
    budget, layers, runs, said = seen.budget, seen.layers, seen.runs, seen.said
    assert (budget, layers) == expected
    if is_settled and "gradient_checkpointing" in flags:
        assert not runs, "nothing is left to choose"
        assert "nothing measured; micro-batches of 16,384 tokens, 9 of 32 layers recomputed" in said
    else:
        assert runs[-1] == expected, "the last dry run is of what was chosen"
        assert real.peak(budget, 32 - layers) <= 0.94 * 141 * GB
        assert f"micro-batches of {budget:,} tokens, {layers} of 32 layers recomputed" in said
        parameters = NUMEL + 2 * (3 * 218_112_000 + 2e8)  # bytes: a half of them, three layers and a bucket
        gradients = 2 * NUMEL + 8 * 2e8  # a half and two buckets, in float32
        activations = real.peak(budget, 32 - layers) - parameters - gradients - 6 * NUMEL
        of_state = f"{parameters / GB:.1f} parameters, {gradients / GB:.1f} gradients, {6 * NUMEL / GB:.1f} optimizer"
        assert f"{of_state}, {activations / GB:.1f} activations" in said


def test_a_model_of_few_layers_has_its_largest_micro_batch_tried_too(monkeypatch):
    """Four layers of 8B, that hold 1 GB more and whose micro-batches need twice what the shape says."""
    shape = models.make_config(**LLAMA_8B | {"num_hidden_layers": 4})
    guess = estimated(shape, parameter_counts(shape), 2, 2, PARTITIONED, ZERO)

    def real(tokens: int, keeping: int) -> float:
        return guess.fixed + 1 * GB + 2 * (guess.peak(tokens, keeping) - guess.peak(0, 0))

    total = guess.peak(0, 0) + 30 * GB
    seen = settled(monkeypatch, shape, real, total, guess.fixed + 1 * GB)
    assert seen.runs[0][0] <= 2 * 4608 and seen.runs[-1][0] == seen.budget > 4096
    peak, larger = (real(tokens, 4 - seen.layers) + guess.optimizer for tokens in (seen.budget, int(1.3 * seen.budget)))
    assert peak <= 0.94 * total < larger
    assert f"{peak / GB:.1f} seen" in seen.said


def test_a_toy_with_a_large_reduce_bucket_gets_a_large_micro_batch(monkeypatch):
    """What it holds, more than DeepSpeed's buffers, and the workspace of matrix products is not taken for growth."""
    shape = models.make_config(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    guess = estimated(shape, parameter_counts(shape), 2, 2, PARTITIONED, ZERO)
    ds_config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 5 * 10**8}}

    def real(tokens: int, keeping: int) -> float:
        return 6.07 * GB + guess.peak(tokens, keeping) - guess.peak(0, 0)

    seen = settled(monkeypatch, shape, real, 10 * GB, 6 * GB, ds_config=ds_config)
    assert seen.budget == seen.runs[-1][0] > 30_000 and seen.layers == 0 and min(seen.runs)[0] >= 1024


def test_what_is_offloaded_takes_no_room_on_the_device(monkeypatch):
    """8B on one device of 84 GB, its optimizer in the host's memory."""
    shape = models.make_config(**LLAMA_8B)
    ds_config = {"zero_optimization": {**DS_CONFIG["zero_optimization"], "offload_optimizer": {"device": "cpu"}}}

    def real(tokens: int, keeping: int) -> float:
        return 2 * NUMEL + 8 * 2e8 + tokens * (0.6e6 + 1e5 * keeping)

    seen = settled(monkeypatch, shape, real, 84 * GB, real(0, 0), world_size=1, ds_config=ds_config)
    peak = real(seen.budget, 32)
    assert seen.budget >= 14_000 and seen.runs[-1] == (seen.budget, 0) and peak <= 0.94 * 84 * GB
    state = f"{2 * NUMEL / GB:.1f} parameters, 1.6 gradients, 0.0 optimizer"
    assert f"{state}, {(peak - real(0, 0)) / GB:.1f} activations" in seen.said


def test_on_a_cpu_the_plan_is_said_by_the_models_shape(monkeypatch):
    shape, whole = models.make_config(**LLAMA_8B), Placement("whole", "resident")
    seen = settled(
        monkeypatch, shape, real_8b, 0.0, placement=whole, device="cpu", dtype=torch.float32, gradient_checkpointing=3
    )
    assert seen.budget == 16384 and seen.layers == 3 and not seen.runs
    state = f"{4 * NUMEL / GB:.1f} parameters, {4 * NUMEL / GB:.1f} gradients, {6 * NUMEL / GB:.1f} optimizer"
    assert state in seen.said and "nothing measured; micro-batches of 16,384 tokens, 3 of 32 layers" in seen.said


@pytest.mark.parametrize("tokens_per_step", [1_400, 22_000, 90_000])
@pytest.mark.parametrize("limit", [100, 112, 500])
def test_a_micro_batch_holds_the_longest_pair_though_no_sequence_in_it_is_as_long(monkeypatch, tokens_per_step, limit):
    """A prompt of 1,000 tokens and two answers of 1,000 each."""
    workload = Workload(3000, 2000, tokens_per_step / 2, 16384, False, "")
    seen = settled(monkeypatch, models.make_config(**LLAMA_8B), real_8b, limit * GB / 0.94, workload=workload)
    assert seen.budget >= 3000 and {(d.longest_sequence, d.longest) for d in seen.demands} == {(2000, 3000)}


def choice_within(limit: float):
    return lambda memory: choose(memory, limit, 32, ANY, 700)[:2]


TRIED = 4096 * (0.6e6 + 8 * 1e5)  # bytes of 4,096 tokens with 8 layers that keep


def test_a_choice_that_fits_is_taken_and_memory_at_most_doubles_on_the_way():
    peaks, sizes = [TRIED + FIXED], []

    def peak_of(tokens, recomputing):
        sizes.append((tokens, recomputing))
        peaks.append(LLAMA_8B_ON_2.peak(tokens, 32 - recomputing))
        assert peaks[-1] - FIXED <= 2 * (peaks[-2] - FIXED)
        return peaks[-1]

    choice = confirmed(LLAMA_8B_ON_2, 150 * GB, 32, TRIED, choice_within(150 * GB), peak_of)
    assert choice[:2] == sizes[-1] == choice_within(150 * GB)(LLAMA_8B_ON_2) and len(sizes) == 4


@pytest.mark.parametrize("factor", [1.02, 1.1, 1.5, 3.0])
def test_a_larger_peak_than_foretold_lowers_the_choice_before_memory_runs_out(factor):
    """Micro-batches that take more than three small ones foretold."""
    real = MemoryModel(44 * GB, factor * 0.6e6, factor * 1e5, 4 * NUMEL)
    peaks = []

    def peak_of(tokens, recomputing):
        peaks.append(real.peak(tokens, 32 - recomputing))
        return peaks[-1]

    budget, recomputing, peak = confirmed(LLAMA_8B_ON_2, 110 * GB, 32, TRIED, choice_within(110 * GB), peak_of)
    assert peak <= 110 * GB and (budget, recomputing) == choice_within(110 * GB)(real)
    assert max(peaks) <= 118 * GB


@pytest.mark.parametrize("factor", [1.5, 3.0, 8.0])
@pytest.mark.parametrize("given", [None, 0])
def test_running_out_of_memory_lowers_the_choice_until_it_fits(factor, given):
    """A device of 120 GB that is told from nothing but running out; 110 GB of it are to be used."""
    real = MemoryModel(44 * GB, factor * 0.6e6, factor * 1e5, 4 * NUMEL)
    sizes = []

    def peak_of(tokens, recomputing):
        sizes.append((tokens, recomputing))
        peak = real.peak(tokens, 32 - recomputing)
        return peak if peak <= 120 * GB else float("inf")

    def choose_by(memory):
        return choose(memory, 110 * GB, 32, ANY._replace(longest=1024), 700, given)[:2]

    budget, recomputing, peak = confirmed(LLAMA_8B_ON_2, 110 * GB, 32, 1e12, choose_by, peak_of)
    assert peak <= 110 * GB and sizes[-1] == (budget, recomputing)
    assert sizes[0] == choose_by(LLAMA_8B_ON_2) and real.peak(sizes[0][0], 32 - sizes[0][1]) > 120 * GB
    assert real.peak(budget, 32 - recomputing) > 95 * GB, "not lowered further than it must be"


def test_running_out_of_memory_on_the_smallest_choice_stops_the_run():
    with pytest.raises(TrainingStopped, match=r"4,096 tokens, 32 of 32 layers .* nothing smaller"):
        confirmed(LLAMA_8B_ON_2, 110 * GB, 32, 1e12, choice_within(110 * GB), lambda *_: float("inf"))


def test_less_than_was_foretold_changes_no_choice():
    choice = confirmed(LLAMA_8B_ON_2, 150 * GB, 32, TRIED, choice_within(150 * GB), lambda *_: 77 * GB)
    assert choice == (*choice_within(150 * GB)(LLAMA_8B_ON_2), 77 * GB)


def test_if_even_the_smallest_choice_is_above_the_limit_it_is_tried_all_the_same():
    for seen in (72, 90):
        choice = confirmed(LLAMA_8B_ON_2, 70 * GB, 32, TRIED, choice_within(70 * GB), lambda *_, seen=seen: seen * GB)
        assert choice[:2] == (4096, 32)


def test_no_dry_run_is_tiny_however_little_was_tried():
    sizes = []

    def peak_of(tokens: int, recomputing: int) -> float:
        sizes.append(tokens)
        return LLAMA_8B_ON_2.peak(tokens, 32 - recomputing)

    confirmed(LLAMA_8B_ON_2, 110 * GB, 32, 1.0, choice_within(110 * GB), peak_of)
    assert sizes[0] == min(sizes) == 1024 and len(sizes) > 2


@pytest.mark.parametrize("given", [0, 10, 32])
def test_given_layers_are_what_the_budget_is_chosen_for(given):
    budget, recomputing, _ = choose(LLAMA_8B_ON_2, 110 * GB, 32, ANY, 700, given)
    assert recomputing == given and LLAMA_8B_ON_2.peak(budget, 32 - given) <= 110 * GB
    assert choose(LLAMA_8B_ON_2, 78 * GB, 32, ANY, 700, given)[:2] == (4096, given)


LLAMA_8B = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("world_size", "free", "expected"),
    [
        (2, 150, ("whole", "resident")),
        (8, 150, ("whole", "resident")),
        (2, 95, ("partitioned", "streamed")),  # whole and resident, the state takes 104 GB
        (8, 85, ("whole", "resident")),
        (8, 40, ("partitioned", "streamed")),
        (1, 150, ("whole", "resident")),  # nothing fits; what is partitioned over one rank is whole
        (1, 170, ("whole", "resident")),
    ],
)
def test_8b_is_placed_by_what_memory_leaves_room_for(monkeypatch, world_size, free, expected):
    assert placed(monkeypatch, models.make_config(**LLAMA_8B), [free * GB] * world_size) == expected


def test_the_estimate_of_8b_is_what_was_measured():
    """On two H200: 73.1 GB without moments, 139.3 GB with them and 10,240 tokens, when each rank held its own parts of
    the resident parameters twice."""
    config, twice = models.make_config(**LLAMA_8B), 2 * NUMEL / 2
    assert parameter_counts(config) == (NUMEL, 218_112_000)
    memory = estimated(config, parameter_counts(config), 2, 2, Placement("whole", "resident"), ZERO)
    assert memory.fixed + twice == pytest.approx(73.1e9, rel=0.03)
    assert memory.peak(10_240, 32) + twice == pytest.approx(139.3e9, rel=0.03)


def test_what_counts_for_memory_is_the_ds_configs():
    config = models.make_config(**LLAMA_8B)
    given = [
        {"reduce_bucket_size": 10**8, "stage3_prefetch_bucket_size": 10**7},
        {"offload_optimizer": {"device": "none"}},
        {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    ]
    zeros = [zero_of({"zero_optimization": {"stage": 3, **keys}}) for keys in given]
    assert zeros[0] == (10**7, 10**8, False, False)
    assert zeros[1] == (5 * 10**7, 5 * 10**8, False, False)  # DeepSpeed's own by default
    assert zeros[2] == (5 * 10**7, 5 * 10**8, True, True)
    fixed = [estimated(config, parameter_counts(config), 2, 2, PARTITIONED, zero).fixed for zero in zeros]
    assert fixed[1] - fixed[0] == pytest.approx(2 * 4e7 + 4 * 2 * 4e8)
    assert fixed[1] - fixed[2] == pytest.approx((2 + 4 + 4) * NUMEL / 2)  # parameters, gradients, masters


def placed(monkeypatch, config, frees, own=None, kept="", budget=None, **flags):
    """Where `place` puts gradients and parameters for ranks with `frees` bytes each, `own` being in the file."""
    said, own, free = [], own or {}, iter(frees)
    ranks = SimpleNamespace(
        device=torch.device("cuda"), world_size=len(frees), say=said.append, gather=lambda work: [work() for _ in frees]
    )
    monkeypatch.setattr("common.zero.memory._free_bytes", lambda ranks: next(free))
    given = {"zero_optimization": {"stage": 3}, **own}
    workload = ANY._replace(budget=budget or 0, is_settled=budget is not None, gradients=kept)
    ds_config, placement = choose_residency(given, SFTConfig(**flags), config, workload, ranks)
    assert given == {"zero_optimization": {"stage": 3}, **own}, "what was given is left as it is"
    assert ds_config == given | {"gradients": placement.gradients, "parameters": placement.parameters}
    assert len(said) == 1 and all(word in said[0] for word in placement)
    return placement


@pytest.mark.parametrize(
    ("frees", "own", "kept", "expected"),
    [
        ((10**12, 10**12), {}, "", ("whole", "resident")),
        ((10**12, 10**9), {}, "", ("partitioned", "streamed")),  # the ranks' least counts
        ((10**12, 10**12), {}, "partitioned", ("partitioned", "resident")),
        ((10**12, 10**12), {"gradients": "partitioned"}, "whole", ("partitioned", "resident")),
        ((10**12, 10**12), {"parameters": "streamed"}, "", ("whole", "streamed")),
        ((10**9, 10**9), {"gradients": "whole", "parameters": "resident"}, "", ("whole", "resident")),
    ],
)
def test_the_files_own_words_on_placement_stand(monkeypatch, frees, own, kept, expected):
    assert placed(monkeypatch, models.make_config(**LLAMA_8B), frees, own, kept) == expected


def test_micro_batches_that_are_given_leave_less_to_keep_whole(monkeypatch):
    """18,432 tokens that keep everything: 60 GB of activations, to which whole and resident add 104 of state."""
    config, frees, flags = models.make_config(**LLAMA_8B), (150 * GB, 150 * GB), {"gradient_checkpointing": "none"}
    assert placed(monkeypatch, config, frees, budget=10_240, **flags) == ("whole", "resident")
    assert placed(monkeypatch, config, frees, budget=18_432, **flags) == ("partitioned", "streamed")


def test_a_resume_keeps_its_budget_at_the_same_number_of_ranks():
    def seen(longest, num_ranks, state, **flags):
        ranks = SimpleNamespace(device=torch.device("cpu"), world_size=num_ranks)
        lengths = np.array([longest // 2, longest, 10])
        return workload_of(SFTConfig(global_batch_size=8, **flags), lengths, longest, "data.jsonl:2", state, ranks)

    state = RunState(micro_batch_budget=700, world_size=4, gradients="partitioned")
    assert seen(100, 4, state) == Workload(100, 100, 8 * (160 / 3) / 4, 700, True, "partitioned")
    assert seen(100, 2, state) == Workload(100, 100, 8 * (160 / 3) / 2, 4096, False, "")
    assert seen(900, 4, state)[3:5] == (900, True)  # --share_prompt false: longer pairs
    assert seen(100, 4, state, max_tokens_per_micro_batch=300)[3:] == (300, True, "partitioned")
    assert seen(100, 4, RunState())[3:] == (4096, False, "")
    with pytest.raises(
        UserError, match=r"_micro_batch 300 is less than the 900 tokens of data.jsonl:2; give at least 900"
    ):
        seen(900, 4, state, max_tokens_per_micro_batch=300)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once(tied):
    config = models.make_config(
        tie_word_embeddings=tied,
        vocab_size=100,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    layer = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16 + 2 * 8
    assert parameter_counts(config) == (100 * 8 * (1 if tied else 2) + 2 * layer + 8, layer)
