"""Who sees whom in a packed row, and what packed attention refuses: pytest tests/test_attention.py"""

import functools
import sys
import types
from itertools import chain, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DiffLlamaConfig, LlamaConfig

from common.failures import UserError
from common.model import attention
from common.model.attention import attention_kwargs, block_mask, registered_name, resolve_kernel
from common.model.packed import PackedModel, model_inputs
from common.step.packing import Document, pack

CPU = torch.device("cpu")
NOTHING = np.zeros(0, np.int64)
# (shared prompt, chosen, rejected) of each document of a row; a plain sample is (length, 0, 0)
ROWS = [[(5, 0, 0)], [(1, 0, 0), (6, 0, 0), (2, 0, 0)], [(4, 3, 2)], [(1, 1, 1), (3, 0, 0), (2, 5, 1), (7, 1, 4)]]


def row_of(shapes, has_targets: bool = False):
    row = pack([[Document(np.zeros(sum(shape)), shape[0], shape[1], NOTHING, NOTHING, [])] for shape in shapes])
    if has_targets:
        row.target_rows = np.arange(len(row.input_ids) - 1)
        row.target_ids = row.target_rows % 50
    return row


def tiny_model(kernel: str, config_class=LlamaConfig, num_layers: int = 3) -> PackedModel:
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_attention_heads=4, num_key_value_heads=2)
    config = config_class(**sizes, num_hidden_layers=num_layers)
    return PackedModel(AutoModelForCausalLM.from_config(config, attn_implementation=registered_name(kernel)))


def attend(kernel: str, *tensors, **kwargs):
    return attention.AttentionInterface()[registered_name(kernel)](torch.nn.Module(), *tensors, **kwargs)[0]


def sees(shapes, window: int = 10**6) -> np.ndarray:
    """bool [T, T] by the definition, token by token: the last `window` tokens of its own sample, or side of a pair."""
    parts = [[(d, part)] * size for d, shape in enumerate(shapes) for part, size in zip("pcr", shape, strict=True)]
    tokens = list(chain(*parts))
    visible = np.zeros((len(tokens), len(tokens)), bool)
    for i, (d, part) in enumerate(tokens):
        own = [j for j, (other, of) in enumerate(tokens) if other == d and j <= i and of in ("p", part)]
        visible[i, own[-window:]] = True
    return visible


N, NONE = st.integers(1, 9), st.just(0)
SOME_ROWS = st.lists(st.tuples(N, N, N) | st.tuples(N, NONE, NONE), min_size=1, max_size=5)


@given(SOME_ROWS)
@settings(max_examples=80, deadline=None)
def test_block_mask_lets_a_token_see_its_own_past_alone(shapes):
    row = row_of(shapes)
    mask = block_mask(torch.from_numpy(row.document), torch.from_numpy(row.branch))
    assert (mask[0, 0].numpy() == sees(shapes)).all()


@given(SOME_ROWS)
@settings(max_examples=80, deadline=None)
def test_varlen_segments_describe_the_same_attention(shapes):
    """Bottom-right causal attention over the segments is, query by query, what the block mask says."""
    row = row_of(shapes)
    kwargs = attention_kwargs(row, "varlen", CPU)
    q, k = kwargs["packed_cu_seqlens_q"].tolist(), kwargs["packed_cu_seqlens_k"].tolist()
    num_tokens = len(row.input_ids)
    index = kwargs["packed_key_index"]
    index = list(range(num_tokens)) if index is None else index.tolist()
    assert len(q) == len(k) and q[-1] == num_tokens and k[-1] == len(index)
    visible = np.zeros((num_tokens, num_tokens), bool)
    for s in range(len(q) - 1):
        num_queries, num_keys = q[s + 1] - q[s], k[s + 1] - k[s]
        assert max(num_queries, num_keys) <= kwargs["packed_max_seqlen"]
        for i in range(num_queries):
            visible[q[s] + i, index[k[s] : k[s] + num_keys - num_queries + i + 1]] = True
    assert (visible == sees(shapes)).all()


@pytest.mark.parametrize("shapes", ROWS)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 0.5, 2.0]).double()])
def test_sdpa_kernel_is_softmax_attention_under_the_mask(shapes, window, cap, sinks):
    """Grouped heads and a scale of its own, against the formula in float64; a sink is a score without a value."""
    row, generator = row_of(shapes), torch.Generator().manual_seed(0)
    num_tokens = len(row.input_ids)
    query, key, value = (torch.randn(1, h, num_tokens, 8, generator=generator).double() for h in (4, 2, 2))
    asked = {"sliding_window": window, "softcap": cap, "s_aux": sinks}
    out = attend("sdpa", query, key, value, scaling=0.3, **asked, **attention_kwargs(row, "sdpa", CPU))
    mask = torch.from_numpy(sees(shapes, window or 10**6))
    for head in range(4):
        scores = 0.3 * query[0, head] @ key[0, head // 2].T
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        weights = torch.exp(scores) * mask
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else torch.exp(sinks[head]))
        rounding = {} if cap is None and sinks is None else {"rtol": 1e-5, "atol": 1e-6}  # it caps in float32
        torch.testing.assert_close(out[0, :, head], weights / total @ value[0, head // 2], **rounding)


def segments(query, key, value, offsets_q, offsets_k, scale, window: int = -1, cap: float = 0.0, sinks=None):
    """Of each segment: its queries' slice, its keys' slice, keys and values of every head, probabilities, lse, and what
    a score's gradient is to be multiplied with for its cap."""
    groups = query.shape[1] // key.shape[1]
    for (q, q_end), (k, k_end) in zip(pairwise(offsets_q), pairwise(offsets_k), strict=True):
        keys, values = (x[k:k_end].repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q:q_end], keys) * scale
        slope = torch.ones_like(scores)
        if cap:
            scores = cap * torch.tanh(scores / cap)
            slope = 1 - (scores / cap) ** 2
        last = int((k_end - k) - (q_end - q))  # aligned bottom-right
        hidden = torch.ones(q_end - q, k_end - k).tril(last) == 0
        if window >= 0:
            hidden |= torch.ones(q_end - q, k_end - k).triu(last - window) == 0
        scores = scores.masked_fill(hidden, -torch.inf)
        of_sinks = torch.full((query.shape[1], 1), -torch.inf) if sinks is None else sinks[:, None]
        lse = torch.logaddexp(scores.logsumexp(-1), of_sinks.to(scores.dtype))
        yield slice(q, q_end), slice(k, k_end), keys, values, (scores - lse[..., None]).exp(), lse, slope


def attention_by_definition(query, key, value, *packing):
    """[T, H, D], [T_k, H_kv, D] twice -> (output [T, H, D], log-sum-exp [H, T])."""
    assert max(query.shape[2], value.shape[2]) <= attention.WIDEST_HEAD
    out, lse = query.new_zeros(*query.shape[:2], value.shape[2]), query.new_zeros(query.shape[1], query.shape[0])
    for q, _, _, values, probabilities, sums, _ in segments(query, key, value, *packing):
        out[q], lse[:, q] = torch.einsum("hqk,khd->qhd", probabilities, values), sums
    return out, lse


def gradients_by_definition(grad, out, lse, query, key, value, offsets_q, offsets_k, scale, *options):
    """P = exp(S - lse), dS = P (dP - sum dO O), dQ = dS K, dK = dS^T Q, dV = P^T dO, whatever output and lse are."""
    grads, heads = [torch.zeros_like(x) for x in (query, key, value)], key.shape[1]
    packing = offsets_q, offsets_k, scale, *options
    for q, k, keys, values, probabilities, sums, slope in segments(query, key, value, *packing):
        probabilities = probabilities * (sums - lse[:, q])[..., None].exp()
        grad_scores = torch.einsum("qhd,khd->hqk", grad[q], values) - (grad[q] * out[q]).sum(-1).T[:, :, None]
        grad_scores = grad_scores * probabilities * slope * scale
        grads[0][q] = torch.einsum("hqk,khd->qhd", grad_scores, keys)
        for i, scores, other in ((1, grad_scores, query[q]), (2, probabilities, grad[q])):
            grads[i][k] += torch.einsum("hqk,qhd->khd", scores, other).unflatten(1, (heads, -1)).sum(2)
    return tuple(grads)


@pytest.fixture
def flash_attn(monkeypatch):
    """Both packages of that name and torch's own operators, with the arguments that they have and the definition in
    place of kernels."""

    def forward(query, key, value, *, return_lse, **kwargs):
        assert return_lse and query.shape[2] == value.shape[2] and query.shape[2] in (64, 128, 256)
        return *attention_by_definition(query, key, value, *told(**kwargs)), None, None, None

    def backward(query, key, value, out, grad, lse, *, learnable_sink, **kwargs):
        packing = told(**kwargs, learnable_sink=learnable_sink)
        torch.testing.assert_close((out, lse), attention_by_definition(query, key, value, *packing))
        grads = gradients_by_definition(grad, out, lse, query, key, value, *packing)
        if learnable_sink is None:
            return grads
        return *grads, -((learnable_sink[:, None] - lse).exp() * (grad * out).sum(-1).T).sum(1)

    def told(
        *,
        softmax_scale,
        softcap,
        learnable_sink,
        causal=False,
        window_size_left=None,
        window_size_right=None,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
    ):
        assert causal == (window_size_left is None) and window_size_right in (None if causal else 0, 0)
        assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
        window = -1 if causal else window_size_left
        return cu_seqlens_q, cu_seqlens_k, softmax_scale, window, softcap, learnable_sink

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap):
        assert causal and window_size[1] == 0 and q.shape[2] == v.shape[2]
        return attention_by_definition(q, k, v, cu_q, cu_k, softmax_scale, window_size[0], softcap)[0]

    def torchs_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **options):
        of_keys = told_torch(q, k, v, causal, dropout, **options)
        assert not debug and max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()
        return *attention_by_definition(q, k, v, cu_q, cu_k, *of_keys), *(torch.empty(0) for _ in range(3))

    def torchs_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused, **options):
        of_keys = told_torch(q, k, v, causal, dropout, **options)
        return gradients_by_definition(grad, out, lse, q, k, v, cu_q, cu_k, *of_keys)

    def told_torch(q, k, v, causal, dropout, *, scale, window_size_left, window_size_right, **others):
        assert causal == (window_size_left < 0) and window_size_right == 0 and dropout == 0
        assert not any(others.values()) and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
        return scale, window_size_left

    interface = {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}
    contents = {"flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func}, "flash_attn.cute": {}}
    for name, functions in (contents | {"flash_attn.cute.interface": interface}).items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", torchs_forward, "CPU")
        library.impl("_flash_attention_backward", torchs_backward, "CPU")
        yield


SINKS = torch.tensor([-1.0, 0.0, 0.5, 2.0])
ASKED = [
    {},
    {"sliding_window": 1},
    {"sliding_window": 3},
    {"softcap": 0.7},
    {"sliding_window": 2, "softcap": 0.7},
    {"s_aux": SINKS},
    {"sliding_window": 2, "s_aux": SINKS},
]
COMPUTED = [
    (kernel, asked)
    for kernel, (_, needs) in attention.KERNELS.items()
    for asked in ASKED
    if kernel != "sdpa" and {*asked} <= {attention.ARGUMENTS[need] for need in needs}
]


@pytest.mark.parametrize(("kernel", "asked"), COMPUTED)
@pytest.mark.parametrize(
    ("shapes", "widths"),
    [
        *((shapes, (8, 8)) for shapes in ROWS),
        *((ROWS[3], widths) for widths in [(5, 3), (12, 20), (192, 128), (264, 8)]),
    ],
)
def test_variable_length_kernels_are_told_what_the_block_mask_says(flash_attn, kernel, asked, shapes, widths):
    """Output and gradients, grouped heads, odd ones; the segments, their alignment, which keys belong to a branch."""
    row, generator = row_of(shapes), torch.Generator().manual_seed(0)
    sizes = zip((4, 2, 2), (widths[0], *widths), strict=True)
    tensors = [torch.randn(1, h, len(row.input_ids), width, generator=generator) for h, width in sizes]
    upstream = torch.randn(1, len(row.input_ids), 4, widths[1], generator=generator)
    results = []
    for name in ("sdpa", kernel):
        own = {key: value.clone() if key == "s_aux" else value for key, value in asked.items()}
        inputs = [x.clone().requires_grad_() for x in tensors]
        inputs += [own["s_aux"].requires_grad_()] if "s_aux" in own else []
        out = attend(name, *inputs[:3], scaling=None, **own, **attention_kwargs(row, name, CPU))
        results.append((out.detach(), *torch.autograd.grad(out, inputs, upstream)))
    for expected, seen in zip(*results, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_compiled_layers_take_no_number_as_a_tensor(flash_attn, monkeypatch):
    """On a GPU that would be one on the CPU, for which C++ is compiled before the first step, for minutes."""
    torch._dynamo.reset()
    inputs = []
    seen = lambda graph, given: (inputs.extend(x for x in given if isinstance(x, torch.Tensor)), graph)[1]  # noqa: E731
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=seen))
    model = tiny_model("flash_attention_4")
    model.compile_layers()
    model(**model_inputs(row_of(ROWS[3], has_targets=True), "flash_attention_4", CPU))[0].sum().backward()
    assert len(inputs) > 10 and all(x.ndim > 0 for x in inputs)


def test_layers_that_differ_in_a_number_are_all_compiled(monkeypatch):
    """DiffLlama's lambda_init follows from the layer's place: a graph each, more than torch.compile allows (8)."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    model = tiny_model("sdpa", DiffLlamaConfig, num_layers=10)
    model.compile_layers()
    model(**model_inputs(row_of(ROWS[3], has_targets=True), "sdpa", CPU))[0].sum().backward()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_torch_compile_may_trust_what_is_said_of_flash_attention_4(flash_attn, with_sinks):
    """Shapes, strides and gradients of the operator without its kernel, for rows whose heads are not contiguous."""
    row = attention_kwargs(row_of(ROWS[3]), "flash_attention_4", CPU)
    length = int(row["packed_cu_seqlens_q"].max())
    query, key, value = (torch.randn(h, length, 64).transpose(0, 1) for h in (4, 2, 2))
    inputs = query, key[row["packed_key_index"]], value[row["packed_key_index"]], *([SINKS.clone()] * with_sinks)
    inputs = [x.requires_grad_() for x in inputs] + [None] * (not with_sinks)
    packing = row["packed_cu_seqlens_q"], row["packed_cu_seqlens_k"], row["packed_max_seqlen"]
    torch.library.opcheck(attention._fa4_forward, (*inputs, *packing, 0.3, 2, 0.0))


REFUSED = [{"position_bias": torch.zeros(2)}, {"indices": torch.zeros(2)}, {"dropout": 0.1}, {"is_causal": False}, None]
OF_SOME = [("softcap", "varlen"), ("s_aux", "flash_attention_2")]


@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [*product(attention.KERNELS, REFUSED), *((kernel, {name: torch.ones(2)}) for name, kernel in OF_SOME)],
)
def test_kernels_refuse_what_they_do_not_compute(flash_attn, kernel, arguments):
    """None: a layer that was not told of the packing."""
    kwargs = {} if arguments is None else attention_kwargs(row_of([(4, 0, 0)]), kernel, CPU) | arguments
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UserError, match="Module"):
        attend(kernel, x, x, x, **kwargs)


FLASH_4, FLASH_2 = (attention.KERNELS[name][0] for name in ("flash_attention_4", "flash_attention_2"))
ON_GPU, FLASH = {*attention.KERNELS} - {"sdpa"}, "flash_attention_2"


@pytest.mark.parametrize(
    ("installed", "capability", "kernel", "refused"),
    [
        ((FLASH_4, FLASH_2), 9, "flash_attention_4", ()),
        ((FLASH_4, FLASH_2), 8, "flash_attention_2", ("flash_attention_4",)),
        ((FLASH_2,), 9, "flash_attention_2", ("flash_attention_4",)),
        ((FLASH_4,), 10, "flash_attention_4", ("flash_attention_2",)),
        ((FLASH_4,), 12, "varlen", ("flash_attention_4", "flash_attention_2")),
    ],
)
def test_auto_is_the_first_kernel_that_runs_here_and_a_kernel_that_does_not_is_refused(
    monkeypatch, installed, capability, kernel, refused
):
    for module in (FLASH_4, FLASH_2):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module) if module in installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    assert resolve_kernel("auto", "cuda", torch.bfloat16) == resolve_kernel(kernel, "cuda", torch.bfloat16) == kernel
    cases = [(name, "cuda", torch.bfloat16) for name in refused]
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        assert resolve_kernel("auto", device, dtype) == "sdpa"
        cases += [(name, device, dtype) for name in ON_GPU]
    bf16 = "cuda", torch.bfloat16
    flash = None if kernel == "varlen" else kernel
    for needs, others in ((attention.WINDOWS, "varlen"), (attention.SOFT_CAP, "sdpa"), (attention.SINKS, "varlen")):
        computes = flash and capability != 10 and needs in attention.KERNELS[flash][1]
        assert resolve_kernel("auto", *bf16, {needs}) == (flash if computes else others)
    cases += [("flash_attention_2", *bf16, {attention.SINKS}), ("varlen", *bf16, {attention.SOFT_CAP})]
    for case in cases:
        with pytest.raises(UserError, match=f"--attn_implementation {case[0]}"):
            resolve_kernel(*case)
