"""What only a GPU can show: the variable-length kernels compute what the block mask says, packed and shared prompts
alike; and what is gathered beside something else is waited for.

    python -m pytest -m cuda tests/test_cuda.py
"""

import copy
from functools import partial

import launch
import models
import numpy as np
import pytest
import test_compile
import test_residency
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.data.tokens import PreferencePair, SFTSample
from common.model import attention, experts, load, summing
from common.model.packed import PackedModel, model_inputs
from common.model.summing import SummingEmbedding, SummingLinear
from common.step import packing
from common.zero import host_state, memory, residency

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
OPTIONS = test_residency.OPTIONS
RANKS = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs"))]
KERNELS = [
    k for k in attention.KERNELS if k != "sdpa" and torch.cuda.is_available() and not attention._why_not(k, True, ())
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def pairs(rng, sizes) -> list[PreferencePair]:
    return [PreferencePair(*(rng.integers(1, 500, n).astype(np.int32) for n in size), 0, 0) for size in sizes]


def conversations(rng, sizes) -> list[SFTSample]:
    return [
        SFTSample(rng.integers(1, 500, n).astype(np.int32), np.array([[max(1, n // 2), n]], np.int32)) for n in sizes
    ]


PAIRS = [(5, 3, 9), (200, 130, 1), (1, 300, 40)]
PACKS = {
    "sft": lambda rng: [packing.sft_documents(s) for s in conversations(rng, [1, 2, 130, 700, 64])],
    "pairs": lambda rng: [packing.pair_documents(p, False) for p in pairs(rng, PAIRS)],
    "shared": lambda rng: [packing.pair_documents(p, True) for p in pairs(rng, PAIRS)],
}


ASKED = [{}, {"sliding_window": 2}, {"sliding_window": 100}, {"softcap": 2.0}, {"softcap": 2.0, "sliding_window": 100}]
ASKED += [{"s_aux": 1.0}, {"s_aux": 1.0, "sliding_window": 100}]
HEADS = [(8, 8, 64, 64), (8, 2, 64, 64), (4, 4, 192, 128), (4, 2, 256, 256), (4, 2, 512, 512), (4, 2, 44, 20)]
HEADS += [(4, 2, 192, 128), (4, 2, 80, 80), (4, 2, 8, 8)]
CASES = [
    pytest.param(kernel, pack, heads, asked, id="-".join(map(str, (kernel, pack, *heads, *asked, *asked.values()))))
    for kernel in KERNELS
    for heads in HEADS
    for pack in (PACKS if heads in HEADS[:2] else ["shared"])
    for asked in ASKED
    if {*asked} <= {attention.ARGUMENTS[need] for need in attention.KERNELS[kernel][1]}
]


@pytest.mark.parametrize(("kernel", "pack", "heads", "asked"), CASES)
def test_varlen_kernel_equals_block_mask_forward_and_backward(kernel, pack, heads, asked):
    """heads: of queries, of keys, numbers of a query and of a value."""
    rng = np.random.default_rng(0)
    micro_batch = packing.pack(PACKS[pack](rng))
    length, device = len(micro_batch.input_ids), torch.device("cuda")
    torch.manual_seed(0)
    of_queries, of_keys, width, of_values = heads
    sizes = ((of_queries, width), (of_keys, width), (of_keys, of_values))
    tensors = [torch.randn(1, h, length, n, device=device) for h, n in sizes]
    tensors += [torch.randn(of_queries, device=device)] if "s_aux" in asked else []
    upstream = torch.randn(1, length, of_queries, of_values, device=device)
    results = []
    for name, dtype in (("sdpa", torch.float32), (kernel, torch.bfloat16)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
        module = torch.nn.Module()
        function = attention.AttentionInterface()[attention.registered_name(name)]
        own = asked | {"scaling": 0.125} | ({"s_aux": inputs[3]} if "s_aux" in asked else {})
        out, _ = function(module, *inputs[:3], **own, **attention.attention_kwargs(micro_batch, name, device))
        out.backward(upstream.to(dtype))
        results.append([out, *(x.grad for x in inputs)])
    for expected, seen in zip(*results, strict=True):
        assert seen.isfinite().all()
        assert relative(seen, expected) < 1e-2  # bfloat16 operands


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss", "qwen3_moe", "mistral"])
def test_windows_caps_sinks_and_experts_equal_transformers_own_eager_attention(architecture, compiled):
    """Samples packed in bfloat16, by the kernel that auto takes, against each alone in float32."""
    changes, device = {"sliding_window": 16} if architecture == "mistral" else {}, "cuda"
    config = models.make_config(architecture, **changes)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").to(device)
    kernel = attention.resolve_kernel("auto", device, torch.bfloat16, load.attention_needs(config, 60))
    policy = PackedModel(copy.deepcopy(plain).to(torch.bfloat16))
    policy.lm.set_attn_implementation(attention.registered_name(kernel))
    policy.lm.config._experts_implementation = experts.GROUPED
    assert architecture == "gemma2" or kernel != "sdpa"
    if compiled:
        policy.compile_layers()
    samples = [np.random.default_rng(n).integers(1, config.vocab_size, n) for n in (60, 41, 23)]
    row = packing.pack([packing.sft_documents(SFTSample(ids, np.array([[1, len(ids)]]))) for ids in samples])
    seen, _ = policy(**model_inputs(row, kernel, torch.device(device)))
    seen.sum().backward()
    expected = []
    for ids in samples:
        tokens = torch.from_numpy(ids)[None].to(device)
        logps = plain(input_ids=tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected.append(logps.gather(1, tokens[0, 1:, None])[:, 0])
    torch.cat(expected).sum().backward()
    assert relative(seen, torch.cat(expected)) < 1e-2
    for (name, ours), theirs in zip(policy.lm.named_parameters(), plain.parameters(), strict=True):
        # With experts a token may go to another one in bfloat16.
        assert relative(ours.grad, theirs.grad) < (0.5 if architecture in models.WITH_EXPERTS else 0.05), name


def tiny(kernel: str, dtype) -> PackedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    name = attention.registered_name(kernel)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=name)
    return PackedModel(lm.to(dtype).cuda())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pack", PACKS)
def test_model_on_varlen_kernel_equals_float32_block_mask(kernel, pack, compiled):
    micro_batch = packing.pack(PACKS[pack](np.random.default_rng(0)))
    results = []
    for name, dtype in (("sdpa", torch.float32), (kernel, torch.bfloat16)):
        model = tiny(name, dtype)
        if compiled and name == kernel:
            model.compile_layers()
        logps, _ = model(**model_inputs(micro_batch, name, torch.device("cuda")))
        logps.sum().backward()
        results.append((logps, {n: p.grad for n, p in model.named_parameters()}))
    (logps, grads), (seen_logps, seen_grads) = results
    assert float((seen_logps - logps).abs().max()) < 0.05
    for name, grad in grads.items():
        assert relative(seen_grads[name], grad) < 3e-2, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", [test_compile.PLAIN, test_compile.SHARED])
@pytest.mark.parametrize("first", test_compile.FIRST)
def test_no_row_is_a_case_of_its_own_to_what_is_compiled(kernel, kind, first):
    device = torch.device("cuda")
    assert test_compile.drive(kernel, kind, first, device, torch.bfloat16, recomputed=1, reference=True) <= 6


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_any_length_is_served_by_one_graph_of_a_norms_backward_pass(kernel):
    """Torch's own settings have limits at 4,096 rows, at twice the width, and where the row has 5 * 2**20 elements."""
    rows = {str(tokens): (tokens, 40, 3) for tokens in (1500, 3000, 4500, 6000, 12_000, 25_000)}
    device, first = torch.device("cuda"), "is ordinary"
    assert test_compile.drive(kernel, test_compile.PLAIN, first, device, torch.bfloat16, hidden=1024, more=rows) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_is_added_in_float32_by_the_matrix_product_itself(dtype):
    torch.manual_seed(0)
    total = torch.randn(256, 512, device="cuda")
    grad, inputs = (torch.randn(1, 3000, n, device="cuda").to(dtype) for n in (256, 512))
    expected = total.double() + grad[0].double().T @ inputs[0].double()
    summing.add_product(total, grad, inputs)
    # A sum rounded to bfloat16 is off by more than 1e-3, and one of 3,000 products in float32 by some 1e-6.
    assert relative(total, expected) < (1e-5 if dtype == torch.bfloat16 else 1e-3)  # float32 may be tf32


@pytest.mark.parametrize("divisor", [1.0, 3.7])
def test_an_update_is_torchs_own(divisor):
    test_residency.check_update("cuda", test_residency.OPTIONS, divisor)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_sums_its_gradients_gives_autograds(compiled):
    """Twice the same micro-batch: the sums are twice the gradient. Tokens repeat, so the embedding's rows do."""
    micro_batch = packing.pack(PACKS["sft"](np.random.default_rng(0)))
    plain, summing = tiny("varlen", torch.bfloat16), tiny("varlen", torch.bfloat16)
    for module in summing.modules():
        if type(module) is torch.nn.Linear:
            module.__class__, module.weight_sum = (SummingLinear, torch.zeros_like(module.weight, dtype=torch.float32))
    embedding, head = summing.lm.get_input_embeddings(), summing.lm.get_output_embeddings()
    embedding.__class__ = SummingEmbedding
    for module in (embedding, head):
        module.weight_sum = torch.zeros_like(module.weight, dtype=torch.float32)
    for model in (plain, summing):
        if compiled:
            model.compile_layers()
        for _ in range(2):
            model(**model_inputs(micro_batch, "varlen", torch.device("cuda")))[0].sum().backward()
    grads = {name: param.grad for name, param in plain.named_parameters()}
    for name, module in summing.named_modules():
        if hasattr(module, "weight_sum"):
            assert module.weight.grad is None
            assert relative(module.weight_sum, grads[f"{name}.weight"]) < 1e-2, name  # which was rounded to bfloat16


def test_shared_prompts_equal_two_documents_on_the_gpu():
    documents = pairs(np.random.default_rng(1), [(7, 3, 9), (120, 30, 61)])
    sums = []
    for share in (False, True):
        micro_batch = packing.pack([packing.pair_documents(p, share) for p in documents])
        sums.append(tiny("varlen", torch.bfloat16)(**model_inputs(micro_batch, "varlen", torch.device("cuda")))[0])
    assert float((sums[0] - sums[1]).abs().max()) < 0.05


def run_with_a_late_rank(folder: str, stays_whole: str) -> list[dict]:
    """test_residency's two steps, in which one rank starts its collectives late."""
    start = residency._start

    def start_late(*arguments, **options):
        if torch.distributed.get_rank() > 0:
            torch.cuda._sleep(40_000_000)  # cycles
        return start(*arguments, **options)

    residency._start = start_late
    return test_residency.run_micro_batches(folder, stays_whole, in_a_row=True)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("stays_whole", ["gradients", "all"])
def test_whole_gradients_and_weights_are_the_plain_ones_though_a_rank_is_late(tmp_path, num_ranks, stays_whole):
    folder = models.make_model(tmp_path, "llama", intermediate_size=49)
    seen = launch.on_ranks(run_with_a_late_rank, num_ranks, str(folder), stays_whole, on_gpu=True)
    test_residency.check_against_plain(folder, seen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("stays_whole", ["nothing", "gradients", "all"])
def test_state_in_host_memory_is_updated_to_the_same_bits(tmp_path, num_ranks, stays_whole, dtype):
    folder = str(models.make_model(tmp_path, "llama", intermediate_size=49))
    run = test_residency.run_micro_batches, num_ranks, folder, stays_whole, False, True
    seen, expected = (launch.on_ranks(*run, share, dtype, on_gpu=True) for share in (0.4, 1.0))
    test_residency.check_host_state(folder, seen, expected, dtype)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_activations_in_gradient_sums_change_no_bit(tmp_path, num_ranks):
    folder = str(models.make_model(tmp_path, "llama", intermediate_size=49, **test_residency.DEEP))
    run = test_residency.run_micro_batches, num_ranks, folder, "all", False, True, 0.4, "bfloat16"
    seen, expected = (launch.on_ranks(*run, opens, on_gpu=True) for opens in (True, False))
    test_residency.check_host_state(folder, seen, expected, "bfloat16")


@pytest.mark.parametrize(("saved", "resumed"), [(0.4, 1.0), (1.0, 0.0)])
def test_a_checkpoint_resumes_wherever_state_lies_to_the_same_bits(tmp_path, saved, resumed):
    folder = str(models.make_model(tmp_path / "model", "llama", intermediate_size=49))
    (tmp_path / "checkpoints").mkdir()
    run = partial(launch.on_ranks, test_residency.save_and_go_on, 1, folder, str(tmp_path), on_gpu=True)
    seen, again = run(False, "all", saved, "bfloat16"), run(True, "all", resumed, "bfloat16")
    for name, (_, *expected) in seen[0].items():
        assert all(map(torch.equal, expected, again[0][name][1:])), name


def test_compiled_states_are_taken_apart_and_put_together_to_the_same_bits():
    test_residency.check_compiled_states("cuda")


@pytest.mark.parametrize("lends", [False, True])
@pytest.mark.parametrize("extra_gb", [0.0, 0.2])
def test_chunks_come_and_go_beside_products_without_a_race(monkeypatch, extra_gb, lends):
    """Four steps of 60 million parameters, through a ring, free and lent memory: the bits of one update."""
    monkeypatch.setattr(host_state, "CHUNK_ELEMENTS", 2**20)
    device, sizes = torch.device("cuda", 0), [30_000_001, 5, 29_999_999]
    torch.manual_seed(0)
    host, carrier = host_state.HostMemory(3 * sum(sizes), device, 4), host_state.Carrier(device)
    host.wait_until_pinned()
    address = host.unused.data_ptr()
    state = tuple(host.take(sum(sizes)) for _ in range(3))
    assert all(x.is_pinned() for x in state)
    state[0].copy_(torch.randn(sum(sizes)))
    whole = [x.cuda() for x in state]
    carrier.add(0, state, sizes)
    carrier.make_ring()
    if extra_gb:
        carrier.memory_limit = torch.cuda.memory_allocated() + 3e9
    gradients, step = [torch.empty(n, device=device) for n in sizes], torch.zeros((), device=device)
    square, stream = torch.randn(4096, 4096, device=device), torch.cuda.Stream()
    memory, lent = torch.empty(2**26, device=device), []
    for _ in range(4):
        for buffer in lent:
            buffer.usable.wait()
        memory.fill_(float("nan"))  # what has not been written back by now is lost
        for gradient in gradients:
            gradient.normal_()
        step += 1
        copies = [gradient.clone() for gradient in gradients]
        residency.update_group(
            *([*x.split(sizes)] for x in (whole[0], torch.cat(copies), *whole[1:])), step, 2.0, OPTIONS
        )
        scratch = torch.empty(2**28, device=device).fill_(1.0)  # "activations", given up before chunks come
        scratch = scratch * 2 + 1
        del scratch
        lent = carrier.lend(memory, needed=1) if lends else []
        assert len(lent) == (21 if lends else 0)
        carrier.bring(in_free_memory=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for chunk, flats in carrier.carry(0):
                lengths = [end - start for _, start, end in chunk.pieces]
                weights, *moments = ([*x.split(lengths)] for x in flats)
                parts = [gradients[i][start:end] for i, start, end in chunk.pieces]
                residency.update_group(weights, parts, *moments, step, 2.0, OPTIONS)
        carrier.end_step()
        assert bool(carrier.used_up) == (extra_gb > 0)
        for _ in range(20):
            carrier.give_up()
            square = (square @ square).clamp(-1, 1)
        torch.cuda.current_stream().wait_stream(stream)
    carrier.wait_until_written()
    for here, there in zip(state, whole, strict=True):
        assert torch.equal(here, there.cpu())
    torch.cuda.cudart().cudaHostUnregister(address)  # a run pins once; the next case may get the same addresses


def test_a_cards_figures_are_measured():
    free, host, link, flops = memory.measuring(torch.device("cuda", 0), 1)()
    assert 1e9 < free < 3e11 and host > 1e9 and 1e9 < link < 1e12 and 1e13 < flops < 1e16


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_grouped_products_and_their_sums_equal_a_loop_over_experts(dtype, is_transposed):
    """Experts without rows among them; two backward passes, to the same bits when they run again."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 700, 700, 2048], dtype=torch.int32, device="cuda")
    weight = 0.05 * torch.randn(4, 96, 256, device="cuda").to(dtype)
    inputs = torch.randn(2048, 256, device="cuda").to(dtype)
    upstream = torch.randn(2048, 96, device="cuda").to(dtype)
    stored = (weight.mT.contiguous() if is_transposed else weight).requires_grad_()
    seen = []
    for _ in range(2):
        total, rows = torch.zeros_like(stored, dtype=torch.float32), inputs.clone().requires_grad_()
        for _ in range(2):
            outputs = summing.grouped_product(rows, stored, total, ends, is_transposed)
            outputs.backward(upstream)
        seen.append((outputs, rows.grad, total.mT if is_transposed else total))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    start = 0
    for e, end in enumerate(ends.tolist()):
        x, w, g = inputs[start:end].double(), weight[e].detach().double(), upstream[start:end].double()
        if end > start:
            assert relative(seen[0][0][start:end], x @ w.T) < tolerance
            assert relative(seen[0][1][start:end], 2 * g @ w) < tolerance
            assert relative(seen[0][2][e], 2 * g.T @ x) < 1e-5  # float32 sums of exact products
        else:
            assert not seen[0][2][e].any()
        start = end
