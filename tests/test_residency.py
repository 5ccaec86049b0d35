"""What is kept whole during a step holds what ZeRO-3's own partitions would: pytest tests/test_residency.py

Of each number of ranks all engines run one after another in one launch, which the tests look at part by part.
"""

import functools
import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import launch
import models
import numpy as np
import pytest
import reference
import torch
from torch import nn

from common import ranks as distributed
from common.config import SFTConfig
from common.data.tokens import SFTSample
from common.model import load as model
from common.model import packed
from common.model.summing import SummingEmbedding, SummingLinear, add_product
from common.step.packing import pack, sft_documents
from common.zero import checkpoint, host_state, opening
from common.zero import residency as kept
from common.zero.ds_config import RESIDENCY, deepspeed_config
from common.zero.engine import build_engine
from common.zero.residency import WholeGradients

CASES = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("qwen2", {}),
    "norms of heads": ("qwen3", {"head_dim": 16}),
    "scalars": ("apertus", {}),  # parameters of one element: some ranks hold padding alone
}
DEEP = {"num_hidden_layers": 6}
WITH_A_GATE = [case for case in CASES if case != "scalars"]  # in its MLP
STATE_IN_HOST = [(0.0, "float32"), (0.4, "bfloat16")]  # (share of the state on the device, dtype)
SAMPLES = [[3, 5, 8, 13, 21, 34], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8], [4, 6], [9, 9, 8, 200, 300]]
# micro-batches of each rank, as indices into SAMPLES: the last one of rank 1 is empty
LEARNING_RATE, EPSILON = 1e-2, 0.1  # so large that it counts whether gradients were clipped
MAX_NORM = 2.0
PLANS = {1: [[[0, 1], [2], [3]]], 2: [[[0], [2]], [[1, 3], []]], 3: [[[0], [2]], [[1], []], [[3], []]]}


# ------------------------------------------------------------------ one product


@pytest.mark.parametrize("num_rows", [0, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_in_float32(dtype, num_rows):
    torch.manual_seed(0)
    grad, inputs = torch.randn(2, num_rows, 5).to(dtype), torch.randn(2, num_rows, 7).to(dtype)
    total = torch.randn(5, 7)
    expected = total.double() + torch.einsum("bto,bti->oi", grad.double(), inputs.double())
    add_product(total, grad, inputs)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 24), nn.Linear(24, 8, bias=False), nn.RMSNorm(8)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_summing_layer_gives_what_autograd_gives(compiled):
    """Two backward passes over rows of two lengths; compiled, one graph serves both blocks and both lengths."""
    torch.manual_seed(0)
    plain = nn.Sequential(Block(), Block())
    summing = nn.Sequential(Block(), Block())
    summing.load_state_dict(plain.state_dict())
    for block in summing:
        for layer in (block.up, block.down):
            layer.__class__, layer.weight_sum = SummingLinear, torch.zeros_like(layer.weight.data)
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in summing:
            block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True)
    for length in (10, 33):
        x = torch.randn(1, length, 8)
        upstream = torch.randn(1, length, 8)
        results = []
        for blocks in (plain, summing):
            inputs = x.clone().requires_grad_()
            blocks(inputs).backward(upstream)
            results.append(inputs.grad)
        torch.testing.assert_close(*results)
    for expected, seen in zip(plain, summing, strict=True):
        for name in ("up", "down"):
            assert getattr(seen, name).weight.grad is None
            torch.testing.assert_close(getattr(seen, name).weight_sum, getattr(expected, name).weight.grad)
        torch.testing.assert_close(seen.up.bias.grad, expected.up.bias.grad)
        torch.testing.assert_close(seen.norm.weight.grad, expected.norm.weight.grad)
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_layer_that_is_used_twice_sums_both():
    torch.manual_seed(0)
    plain, summing = nn.Linear(8, 8), nn.Linear(8, 8)
    summing.load_state_dict(plain.state_dict())
    summing.__class__, summing.weight_sum = SummingLinear, torch.zeros(8, 8)
    x = torch.randn(5, 8)
    for layer in (plain, summing):
        layer(torch.tanh(layer(x))).square().sum().backward()
    torch.testing.assert_close(summing.weight_sum, plain.weight.grad)


def test_rows_of_an_embedding_are_summed_in_the_same_order_every_time():
    torch.manual_seed(0)
    ids, grad = torch.randint(7, (1, 3000)), torch.randn(1, 3000, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    sums = []
    for _ in range(6):
        embedding = nn.Embedding(7, 64, padding_idx=3)
        embedding.__class__, embedding.weight_sum = SummingEmbedding, torch.zeros(7, 64)
        embedding(ids).backward(grad)
        assert embedding.weight.grad is None
        sums.append(embedding.weight_sum)
    torch.set_num_threads(threads)
    assert all((again == sums[0]).all() for again in sums)
    expected = torch.zeros(7, 64, dtype=torch.float64).index_add_(0, ids[0], grad[0].double())
    expected[3] = 0
    torch.testing.assert_close(sums[0].double(), expected, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------ one update

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SIZES = [1, 7, 1024, 5001]


def check_update(device: str, options: dict, divisor: float) -> None:
    """Three updates on stretches of flat tensors, which start where the last one ended: torch's AdamW, in float64,
    and its fused one in float32, to the bit."""
    torch.manual_seed(0)
    flat = [torch.randn(sum(SIZES)), torch.zeros(sum(SIZES)), torch.zeros(sum(SIZES))]
    weights, exp_avgs, exp_avg_sqs = (list(x.to(device).split(SIZES)) for x in flat)
    exact = [nn.Parameter(x.double()) for x in weights]
    same = [nn.Parameter(x.clone()) for x in weights]
    optimizers = torch.optim.AdamW(exact, **options), torch.optim.AdamW(same, **options, fused=True)
    step = torch.zeros((), device=device)
    for _ in range(3):
        gradients = [torch.randn(n, device=device) * 10.0 ** torch.randint(-6, 2, (n,), device=device) for n in SIZES]
        for params in (exact, same):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient.to(param.dtype) / torch.tensor(divisor, device=device)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        kept.update_group(weights, gradients, exp_avgs, exp_avg_sqs, step, divisor, options)
    for seen, of_torch, expected in zip(weights, same, exact, strict=True):
        assert torch.equal(seen, of_torch)
        torch.testing.assert_close(seen, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divisor", [1.0, 3.7])
@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0}, {"betas": (0.0, 0.5)}, {"lr": 0.0}], ids=str)
def test_an_update_is_torchs_own(changes, divisor):
    check_update("cpu", OPTIONS | changes, divisor)


# ------------------------------------------------------------------ under ZeRO-3


group = functools.cache(lambda: distributed.start(5))  # of this rank's process


def in_turn(calls: list[tuple]) -> list:
    """In a rank's process: what each of these functions returns for the arguments behind it."""
    return [function(*arguments) for function, *arguments in calls]


def make_engine(folder: str, residency: str, ranks: distributed.Ranks, share: float = 1.0, dtype: str = "float32"):
    config = SFTConfig(dtype=dtype, max_grad_norm=MAX_NORM, learning_rate=LEARNING_RATE, adam_epsilon=EPSILON)
    ds_config = deepspeed_config(config) | {"residency": residency, "optimizer_state": share}
    # Several groups of parameters in a step, and buffers that are filled with NaN in no time.
    ds_config["zero_optimization"] |= {"sub_group_size": 3000, "reduce_bucket_size": 30_000}
    policy = model.load_partitioned(folder, model.load_config(folder), getattr(torch, dtype), "sdpa", ds_config, ranks)
    return policy, build_engine(policy, config, ds_config)


def backward_passes(engine, ranks: distributed.Ranks):
    """Those of a step of PLANS on this rank; yields after each."""
    plan = PLANS[ranks.world_size][ranks.rank]
    for m, members in enumerate(plan):
        row = pack([sft_documents(SFTSample(np.array(SAMPLES[i]), np.array([[1, len(SAMPLES[i])]]))) for i in members])
        engine.set_gradient_accumulation_boundary(m == len(plan) - 1)
        engine.backward(-engine(**packed.model_inputs(row, "sdpa", ranks.device))[0].sum() * ranks.world_size)
        yield


def run_micro_batches(
    folder: str,
    residency: str,
    functional: bool = False,
    in_a_row: bool = False,
    share: float = 1.0,
    dtype="float32",
    opens: bool = False,
) -> list[dict]:
    """Two steps of PLANS. For each: {name: this rank's part of the gradient} before it, the norm, and every
    parameter, whole, after it; in_a_row: only after the last, so that nothing waits for what a step began. functional:
    a layer uses the weight of one of its modules, and of another as well as the module itself; and no hook is called
    for embedding and head, whose weights get no gradient from autograd, as torch may have it. opens: the second step's
    first micro-batch keeps activations in gradient sums."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN, so that whoever reads it is found out
    ranks = group()
    host_state.CHUNK_ELEMENTS = 700  # some parameters have more, and the ring's buffers are used again
    policy, engine = make_engine(folder, residency, ranks, share, dtype)
    assert (not engine.updater.carrier.by_group) == (share == 1.0)
    engine.updater.carrier.memory_limit = 10**9 if ranks.device.type == "cuda" else None
    if opens:
        opening.LEAST_BYTES, engine.whole_gradients.opens = 64, True
    if functional:
        mlp = policy.decoder_layers()[0].mlp
        mlp.forward = lambda x: nn.functional.linear(
            mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + nn.functional.linear(x, mlp.up_proj.weight)) / 2,
            mlp.down_proj.weight,
        )
        in_layers = {param for layer in policy.decoder_layers() for param in layer.parameters()}
        outside = [param for group in engine.optimizer.fp16_groups for param in group if param not in in_layers]
        assert len(outside) == len(engine.optimizer._grad_acc_hooks)
        for param, hook in zip(outside, engine.optimizer._grad_acc_hooks, strict=True):
            if param.ds_shape != torch.Size([param.ds_numel]):  # not the norm's
                hook.remove()
    parameters = dict(policy.lm.named_parameters())
    names = {param: name for name, param in parameters.items()}
    seen = []
    for step in range(2):
        for m, _ in enumerate(backward_passes(engine, ranks)):
            assert all(param.grad is None for param in parameters.values())
            if opens and m == 0:
                assert (engine.whole_gradients.opening.kept_bytes > 0) == (step > 0)
                assert not any(sums.is_used for sums in engine.whole_gradients.of_layer.values())
        zero = engine.optimizer
        parts = {
            names[param]: part.cpu().clone().flatten()
            for i, group in enumerate(zero.fp16_groups)
            for param, part in zip(group, zero.averaged_gradients[i], strict=True)
        }
        engine.step()
        norm = float(engine.get_global_grad_norm())
        if opens:  # a dry run has no more room than a step that follows an update
            all_sums = [*engine.whole_gradients.of_layer.values()][: -opening.LAYERS_BETWEEN]
            lent = [sums.num_lent for sums in all_sums]
            engine.whole_gradients.open_as_after_an_update()
            assert lent == [sums.num_lent for sums in all_sums] and any(lent) == (ranks.world_size > 1)
        whole = {}
        if residency == "all" and not (in_a_row and step == 0):
            assert zero.lp_param_buffer.untyped_storage().nbytes() == 0
            policy.finish_gathering()
            for param in parameters.values():
                assert param.ds_tensor.untyped_storage().data_ptr() == param.untyped_storage().data_ptr(), "held twice"
            whole = {name: param.detach().cpu().clone() for name, param in parameters.items()}
        past_the_end, state = [], {}
        if step == 1:
            past_the_end = padding(engine, policy, ranks)
            state = {name: shards(engine, param) for name, param in parameters.items()}
        seen.append({"parts": parts, "norm": norm, "whole": whole, "padding": past_the_end, "state": state})
    return seen


def shards(engine, param) -> list[torch.Tensor]:
    """This rank's of a weight, its master weight and both moments."""
    shard, size = kept.state_shards(engine)[param], param.ds_tensor.numel()
    return [x.cpu().clone() for x in (param.ds_tensor.data, *(shard.read(kind, 0, size) for kind in checkpoint.KINDS))]


def padding(engine, policy, ranks: distributed.Ranks) -> list[float]:
    """What this rank's shards, master weights and moments hold past the ends of the parameters."""
    assert kept.weights_are_finite(engine)
    engine.updater.carrier.wait_until_written()
    values = []
    for param in policy.parameters():
        start = max(0, param.ds_numel - ranks.rank * param.ds_tensor.numel())
        values += [value for shard in shards(engine, param) for value in shard.flatten()[start:].tolist()]
    return values


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root, odd = tmp_path_factory.mktemp("models"), {"intermediate_size": 49}  # so that parts are padded
    cases = CASES | {"deep": ("llama", DEEP)}
    return {case: str(models.make_model(root / case, name, **odd | more)) for case, (name, more) in cases.items()}


@pytest.fixture(scope="module")
def seen(folders):
    """seen(num_ranks): what each rank saw of each run, by the arguments that tell its test which it is."""

    @functools.cache
    def seen(num_ranks: int) -> dict[tuple, tuple]:
        run, late, llama = run_micro_batches, run_with_late_zeros, folders["llama"]
        calls = {(case, how): (run, folders[case], how) for case in CASES for how in RESIDENCY}
        if num_ranks < 3:
            calls |= {(case, "functional"): (run, folders[case], "all", True) for case in WITH_A_GATE}
            places = [*STATE_IN_HOST, *((1.0, dtype) for _, dtype in STATE_IN_HOST)]
            calls |= {(how, *at): (run, llama, how, False, True, *at) for how in RESIDENCY for at in places}
            calls |= {(case, share): (late, folders[case], share) for case in CASES for share in (0.0, 1.0)}
            deep = run, folders["deep"], "all", False, True
            calls |= {("deep", *at, opens): (*deep, *at, opens) for at in STATE_IN_HOST for opens in (False, True)}
        ran = launch.on_ranks(in_turn, num_ranks, [*calls.values()])
        return dict(zip(calls, zip(*ran, strict=True), strict=True))

    return seen


@pytest.mark.parametrize("num_ranks", PLANS)
@pytest.mark.parametrize("residency", RESIDENCY)
@pytest.mark.parametrize("case", CASES)
def test_each_ranks_part_is_its_part_of_the_plain_gradient(folders, seen, case, num_ranks, residency):
    """And two steps of AdamW on it give the plain weights: what is left of a step's sums does not get into the next."""
    check_against_plain(folders[case], seen(num_ranks)[case, residency])


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", WITH_A_GATE)
def test_a_weight_that_is_used_without_its_module_is_not_forgotten(folders, seen, case, num_ranks):
    check_against_plain(folders[case], seen(num_ranks)[case, "functional"])


class LateStream:
    """Stands for a CUDA stream: what is zeroed on it happens when another one waits for it, and not before."""

    def __init__(self):
        self.zeroing, self.late = torch._foreach_zero_, []

    def __enter__(self):
        torch._foreach_zero_ = self.late.append

    def __exit__(self, *_):
        torch._foreach_zero_ = self.zeroing

    def wait_stream(self, other) -> None:
        pass  # the other one is never late

    def record_event(self):
        until = len(self.late)

        def wait() -> None:
            for i in range(until):
                if self.late[i] is not None:
                    self.zeroing(self.late[i])
                self.late[i] = None

        return SimpleNamespace(wait=wait)


def run_with_late_zeros(folder: str, share: float) -> list[dict]:
    initialize, current = WholeGradients.__init__, LateStream()

    def with_a_stream(self, *arguments):
        initialize(self, *arguments)
        self.beside = LateStream()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeGradients, "__init__", with_a_stream)
        patch.setattr(torch.cuda, "current_stream", lambda: current)
        patch.setattr(torch.cuda, "stream", lambda stream: stream or nullcontext())
        return run_micro_batches(folder, "all", in_a_row=True, share=share)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_backward_pass_waits_until_the_last_steps_sums_are_zeros(folders, seen, case, num_ranks, share):
    check_against_plain(folders[case], seen(num_ranks)[case, share])


@pytest.mark.parametrize(("share", "dtype"), STATE_IN_HOST)
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("residency", RESIDENCY)
def test_state_in_host_memory_is_updated_to_the_same_bits(folders, seen, residency, num_ranks, share, dtype):
    of_all = seen(num_ranks)
    check_host_state(folders["llama"], of_all[residency, share, dtype], of_all[residency, 1.0, dtype], dtype)


@pytest.mark.parametrize(("share", "dtype"), STATE_IN_HOST)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_activations_in_gradient_sums_change_no_bit(folders, seen, num_ranks, share, dtype):
    of_all = seen(num_ranks)
    check_host_state(folders["deep"], of_all["deep", share, dtype, True], of_all["deep", share, dtype, False], dtype)


def check_compiled_states(device: str) -> None:
    """Of any length and wherever they lie, in one graph each: another would take seconds in the middle of a run."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    memory = torch.empty(40_000, device=device)
    for n, start in itertools.product((6400, 64, 6403), (0, 64, 6400)):
        apart = torch.zeros(2 * n, dtype=torch.int16, device=device)[n:], torch.rand(n, device=device)
        for lost, exp_avg_sq in (apart, host_state.places_in(memory[start:], n, 2, 6464)[::2]):
            master, second = torch.randn(n, device=device), exp_avg_sq.uniform_().clone()
            master[:3] = torch.tensor([1 + 2**-8, 1 - 2**-9, -1 - 2**-8])  # midway
            host_state.compiled(host_state.take_apart)(master, master.bfloat16(), lost, exp_avg_sq)
            again = host_state.compiled(host_state.put_together)(master.bfloat16(), lost, exp_avg_sq)
            assert torch.equal(again, master) and torch.equal(exp_avg_sq, second)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_states_are_taken_apart_and_put_together_to_the_same_bits():
    check_compiled_states("cpu")


def test_what_is_needed_first_is_given_back_first():
    """Chunks through a ring of 8 and three layers' 4 buffers each, the last layer's needed first: once few chunks are
    left they go where nobody waits, and what is written last lies in the ring and in the first layer's buffers."""
    carrier, num_chunks = host_state.Carrier(torch.device("cpu")), 61
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_state, "CHUNK_ELEMENTS", 64)
        carrier.add(0, tuple(torch.zeros(64 * num_chunks) for _ in range(3)), [64 * num_chunks])
    carrier.make_ring()
    for layer in (3, 2, 1):
        assert len(carrier.lend(torch.empty(4 * carrier.words), needed=layer)) == 4
    carrier.bring()
    used, chunks = [], carrier.carry(0)  # when the buffer of each chunk is needed
    for _ in range(num_chunks):
        used.append(carrier.brought[0][0].needed)
        next(chunks)
    assert used[:20] == [0] * 8 + [3] * 4 + [2] * 4 + [1] * 4 == used[20:40], "all are used while many chunks wait"
    last = [max(i for i, needed in enumerate(used) if needed == layer) for layer in (3, 2, 1, 0)]
    assert last == sorted(last) and num_chunks - last[0] > 8 + 4


def check_host_state(folder, seen: list, expected: list, dtype: str) -> None:
    """expected: of a run that differs in nothing but that all its state lies on the device."""
    {"float32": check_against_plain, "bfloat16": check_master_weights}[dtype](folder, seen)
    for ours, theirs in zip(seen, expected, strict=True):
        assert len(ours[1]["state"]) > 10
        for name, same in theirs[1]["state"].items():
            assert all(torch.equal(*pair) for pair in zip(ours[1]["state"][name], same, strict=True)), name


def check_master_weights(folder, seen: list) -> None:
    """Of a bfloat16 model, of which what rounding has lost is kept: torch's AdamW on float32 ones, to the bit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = dict(reference.load(folder).named_parameters())
    for rank, steps in enumerate(seen):
        for name, part in steps[0]["parts"].items():
            whole = weights[name].detach().bfloat16().float().flatten()
            whole = nn.functional.pad(whole, (0, len(seen) * len(part) - len(whole)))
            master = nn.Parameter(whole[rank * len(part) :][: len(part)].to(device))
            optimizer = torch.optim.AdamW([master], LEARNING_RATE, eps=EPSILON, weight_decay=0.0, fused=True)
            for step in steps:
                divisor = torch.tensor(max(1.0, (step["norm"] + 1e-6) / MAX_NORM), device=device)
                master.grad = step["parts"][name].to(device) / divisor
                optimizer.step()
            expected = master.detach(), *(optimizer.state[master][kind] for kind in ("exp_avg", "exp_avg_sq"))
            weight, *state = steps[-1]["state"][name]
            assert torch.equal(weight, expected[0].bfloat16().cpu()), name
            assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(state, expected, strict=True)), name


def test_weights_are_looked_at_in_pieces_and_once_an_update_has_given_up_its_memory(monkeypatch):
    """Of a layer's experts a parameter is as large as what is left free: seen with 2 GB at the end of a run."""
    sizes, real, carrier = [], torch.Tensor.isfinite, host_state.Carrier(torch.device("cpu"))

    def isfinite(piece):
        assert not carrier.used_up
        sizes.append(piece.numel())
        return real(piece)

    monkeypatch.setattr(torch.Tensor, "isfinite", isfinite)
    monkeypatch.setattr(host_state, "CHUNK_ELEMENTS", 100)
    shards = [[torch.ones(30)], [torch.ones(250)]]
    engine = SimpleNamespace(module=SimpleNamespace(finish_gathering=lambda: None))
    engine.optimizer, engine.updater = SimpleNamespace(fp16_partitioned_groups=shards), SimpleNamespace(carrier=carrier)
    carrier.used_up.append(host_state.Buffer(torch.empty(8)))
    assert kept.weights_are_finite(engine) and sizes == [30, 100, 100, 50]
    shards[1][0][249] = torch.nan
    assert not kept.weights_are_finite(engine)


def save_and_go_on(folder: str, out: str, resume: bool, residency: str, share: float, dtype: str) -> dict:
    """One step and a checkpoint, or with `resume` that checkpoint loaded, and one step more: {name: [this rank's of the
    weight and its state]}."""
    torch.use_deterministic_algorithms(True)
    host_state.CHUNK_ELEMENTS = 700
    ranks = group()
    policy, engine = make_engine(folder, residency, ranks, share, dtype)
    parameters = dict(policy.lm.named_parameters())
    path = Path(out) / "checkpoints" / "step_00000001"
    config = SFTConfig(output_dir=out)
    saved = checkpoint.RunState(step=1, world_size=ranks.world_size)
    if resume:
        checkpoint.load(engine, parameters, path, saved, config.resume, ranks)
    for step in range(int(resume), 2):
        for _ in backward_passes(engine, ranks):
            pass
        engine.step()
        if step == 0:
            writer = checkpoint.Writer(engine, parameters, config, ranks)
            writer.save(saved)
            writer.wait()
    policy.finish_gathering()
    return {name: [param.ds_numel, *shards(engine, param)] for name, param in parameters.items()}


def go_on_while_gathering(*arguments) -> dict:
    """save_and_go_on, whose collectives take what they are given at once, and write it no sooner than it is waited for:
    the weights of the new engine are still being gathered when the checkpoint is read."""
    start = kept._start

    def start_late(collective, pairs, group, **options):
        given = [(output, input_.clone()) for output, input_ in pairs]
        return [SimpleNamespace(wait=lambda: [work.wait() for work in start(collective, given, group, **options)])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "_start", start_late)
        return save_and_go_on(*arguments)


SHARES = [(1.0, 0.0), (0.0, 1.0), (0.4, 0.0)]  # of the state on the device, as saved and as resumed
PLACED = [("all", "bfloat16"), ("nothing", "bfloat16"), ("all", "float32")]


@pytest.fixture(scope="module")
def gone_on(folders, tmp_path_factory) -> dict[tuple, tuple]:
    """By SHARES and PLACED: what two ranks saw that went on, two that resumed, and one that did."""
    first, again = {}, {}
    for of_case in itertools.product(SHARES, PLACED):
        (saved, resumed), (residency, dtype) = of_case
        out = tmp_path_factory.mktemp("saved")
        (out / "checkpoints").mkdir()
        first[of_case] = save_and_go_on, folders["llama"], str(out), False, residency, saved, dtype
        again[of_case] = folders["llama"], str(out), True, residency, resumed, dtype
    late = [(go_on_while_gathering, *arguments) for arguments in again.values()]
    pairs = [*zip(*launch.on_ranks(in_turn, 2, [*first.values(), *late]), strict=True)]
    alone = zip(*launch.on_ranks(in_turn, 1, [(save_and_go_on, *a) for a in again.values()]), strict=True)
    return dict(zip(first, zip(pairs, pairs[len(first) :], alone, strict=False), strict=True))


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("placed", PLACED)
def test_a_checkpoint_resumes_wherever_state_lies_to_the_same_bits_and_on_other_ranks(gone_on, shares, placed):
    expected, same, alone = gone_on[shares, placed]
    dtype = placed[1]
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.05, "atol": 0.02}
    for name, (numel, *first) in expected[0].items():
        for i in range(len(first)):
            ranks_own = [rank[name][1 + i] for rank in expected]
            assert all(map(torch.equal, ranks_own, [rank[name][1 + i] for rank in same])), name
            torch.testing.assert_close(torch.cat(ranks_own)[:numel], alone[0][name][1 + i], **close)


def test_what_rounding_loses_and_the_rounded_weight_give_every_float_back():
    """Each of the 2**16 lower halves, behind even and odd upper ones, of either sign, subnormal, and rounded to inf."""
    upper = torch.tensor([0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, -0x8000, -0x7FFF, -0x4080, -0x407F, -0x81])
    bits = (upper.to(torch.int32)[:, None] << 16) + torch.arange(2**16, dtype=torch.int32)
    master = bits.flatten().view(torch.float32)
    weight, second = master.bfloat16(), torch.rand(len(master)) * (torch.arange(len(master)) % 3 > 0)
    lost, kept_second = torch.empty(len(master), dtype=torch.int16), second.clone()
    for _ in range(2):  # what the sign meant before does not count
        host_state.take_apart(master, weight, lost, kept_second)
    assert kept_second.signbit().sum() == 5  # one of each even upper half
    assert torch.equal(host_state.put_together(weight, lost, kept_second).view(torch.int32), master.view(torch.int32))
    assert torch.equal(kept_second.view(torch.int32), second.view(torch.int32))


@pytest.mark.parametrize(("sizes", "most"), [([5], 64), ([500, 1, 130, 63, 65], 200), ([3] * 3, 999), ([64] * 9, 65)])
def test_chunks_are_the_shards_in_order_and_no_larger_than_they_may_be(sizes, most):
    chunks = list(host_state.pieces_of(sizes, most))
    elements = [(i, e) for pieces in chunks for i, start, end in pieces for e in range(start, end)]
    assert elements == [(i, e) for i, size in enumerate(sizes) for e in range(size)]
    assert all(0 < sum(end - start for _, start, end in pieces) <= most for pieces in chunks)
    assert all(start % host_state.ALIGNED == 0 for pieces in chunks for _, start, _ in pieces)


def check_against_plain(folder, seen: list) -> None:
    num_ranks = len(seen)
    assert not any(value != 0 for rank in seen for step in rank for value in step["padding"])
    assert num_ranks < 3 or any(step["padding"] for rank in seen for step in rank), "nothing was padded"
    plain = reference.load(folder)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    for step in range(2):
        for ids in SAMPLES:
            (-reference.token_logps(plain, ids, list(range(1, len(ids)))).sum()).backward()
        for name, param in plain.named_parameters():
            gradient = torch.cat([rank[step]["parts"][name] for rank in seen])[: param.numel()]
            torch.testing.assert_close(
                gradient, param.grad.flatten(), rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        norm = torch.cat([param.grad.double().flatten() for param in plain.parameters()]).norm().item()
        assert [rank[step]["norm"] for rank in seen] == pytest.approx([norm] * num_ranks, rel=1e-5)
        assert norm > 2 * MAX_NORM
        for param in plain.parameters():
            param.grad *= MAX_NORM / (norm + 1e-6)
        optimizer.step()
        optimizer.zero_grad()
        for rank in seen:
            for name, whole in rank[step]["whole"].items():
                torch.testing.assert_close(whole, plain.get_parameter(name).data, rtol=1e-3, atol=1e-4)
