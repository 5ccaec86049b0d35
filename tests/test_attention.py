"""Who sees whom in a packed row, and what packed attention refuses: pytest tests/test_attention.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import attention
from common.attention import attention_kwargs, block_mask, registered_name, resolve_kernel
from common.errors import UserError
from common.packing import Document, pack

CPU = torch.device("cpu")
NOTHING = np.zeros(0, np.int64)
# (shared prompt, chosen, rejected) of each document of a row; a plain sample is (length, 0, 0)
ROWS = [[(5, 0, 0)], [(1, 0, 0), (6, 0, 0), (2, 0, 0)], [(4, 3, 2)], [(1, 1, 1), (3, 0, 0), (2, 5, 1), (7, 1, 4)]]


def row_of(shapes):
    return pack([[Document(np.zeros(sum(shape)), shape[0], shape[1], NOTHING, NOTHING, [])] for shape in shapes])


def sees(shapes) -> np.ndarray:
    """bool [T, T] by the definition, token by token."""
    tokens = [
        (d, part, t)
        for d, shape in enumerate(shapes)
        for part, size in zip("pcr", shape, strict=True)
        for t in range(size)
    ]
    visible = np.zeros((len(tokens), len(tokens)), bool)
    for i, (d, part, t) in enumerate(tokens):
        for j, (other_d, other_part, other_t) in enumerate(tokens):
            earlier = other_part == "p" if part != other_part else other_t <= t
            visible[i, j] = d == other_d and earlier and not (part == "p" and other_part != "p")
    return visible


some_rows = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
    | st.tuples(st.integers(1, 9), st.just(0), st.just(0)),
    min_size=1,
    max_size=5,
)


@given(some_rows)
@settings(max_examples=80, deadline=None)
def test_block_mask_lets_a_token_see_its_own_past_alone(shapes):
    row = row_of(shapes)
    mask = block_mask(torch.from_numpy(row.document), torch.from_numpy(row.branch))
    assert (mask[0, 0].numpy() == sees(shapes)).all()


@given(some_rows)
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
def test_sdpa_kernel_is_softmax_attention_under_the_mask(shapes):
    """Grouped heads and a scale of its own, against the formula in float64."""
    row, generator = row_of(shapes), torch.Generator().manual_seed(0)
    num_tokens = len(row.input_ids)
    query, key, value = (
        torch.randn(1, heads, num_tokens, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    out, _ = attention._sdpa(torch.nn.Module(), query, key, value, scaling=0.3, **attention_kwargs(row, "sdpa", CPU))
    mask = torch.from_numpy(sees(shapes))
    for head in range(4):
        scores = 0.3 * query[0, head] @ key[0, head // 2].T
        expected = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ value[0, head // 2]
        torch.testing.assert_close(out[0, :, head], expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(2)}, "position_bias"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "not causal"),
    ],
)
@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash_attention_2"])
def test_kernels_refuse_what_they_do_not_compute(kernel, arguments, named):
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn")
    kwargs = attention_kwargs(row_of([(4, 0, 0)]), kernel, CPU)
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UserError, match=named):
        attention.AttentionInterface()[registered_name(kernel)](torch.nn.Module(), x, x, x, **kwargs, **arguments)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_a_layer_that_was_not_told_of_the_packing_stops(kernel):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(UserError, match="keyword arguments"):
        attention.AttentionInterface()[registered_name(kernel)](torch.nn.Module(), x, x, x)


def test_kernel_choice(monkeypatch):
    assert resolve_kernel("auto", "cpu", torch.bfloat16) == "sdpa"
    assert resolve_kernel("auto", "cuda", torch.float32) == "sdpa"
    for installed, kernel in ((object(), "flash_attention_2"), (None, "varlen")):
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name, installed=installed: installed)
        assert resolve_kernel("auto", "cuda", torch.bfloat16) == kernel
    for name in ("varlen", "flash_attention_2"):
        with pytest.raises(UserError, match="needs a CUDA device"):
            resolve_kernel(name, "cpu", torch.bfloat16)
    with pytest.raises(UserError, match="not installed"):
        resolve_kernel("flash_attention_2", "cuda", torch.bfloat16)
