"""Nothing is compiled after the first rows because sizes happen to be equal, or 0, or 1: pytest tests/test_compile.py

tests/test_cuda.py drives the same rows on a GPU.
"""

import functools
import threading

import numpy as np
import pytest
import torch
from test_attention import flash_attn  # noqa: F401
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from common.model.attention import registered_name
from common.model.logprobs import LogProbHead
from common.model.packed import PackedModel, model_inputs
from common.model.summing import SummingLinear
from common.step.packing import Document, MicroBatch, pack

SIZE = 64  # hidden_size, intermediate_size, vocabulary and cu_seqlens' least length: one row meets all at once
HEADS = 8  # and a head's size
CHUNK = 80  # rows of the head's chunks
PLAIN, SHARED = 0, 1


def row(kind: int, tokens: int, targets: int, documents: int = 1) -> MicroBatch:
    """Documents of equal lengths but for the last; SHARED: each a stem and two branches."""
    if not documents:
        return pack([], kind == SHARED)
    lengths = [tokens // documents] * (documents - 1)
    lengths.append(tokens - sum(lengths))
    shapes = [(n - 2 * (n // 3), n // 3) if kind == SHARED else (n, 0) for n in lengths]
    nothing = np.zeros(0, np.int64)
    sizes = zip(lengths, shapes, strict=True)
    laid = [[Document(np.arange(n) % SIZE, *shape, nothing, nothing, [])] for n, shape in sizes]
    micro_batch = pack(laid, kind == SHARED)
    micro_batch.target_rows, micro_batch.target_ids = np.arange(targets) % tokens, np.arange(targets) * 7 % SIZE
    return micro_batch


ROWS = {  # tokens, targets, documents
    "tokens as the model's sizes": (SIZE, 31, 2),
    "tokens as heads": (HEADS, 5, 1),
    "tokens as heads of keys": (HEADS // 2, 3, 1),
    "keys as the model's sizes": (3 * SIZE // 4, 31, 1),
    "tokens as max_seqlen": (512, 31, 9),
    "more than the least max_seqlen": (600, 31, 1),
    "targets as the model's sizes": (50, SIZE, 2),
    "targets as heads": (50, HEADS, 2),
    "tokens and targets as the model's sizes": (SIZE, SIZE, 2),
    "targets as tokens": (50, 50, 2),
    "targets as a chunk": (50, CHUNK, 2),
    "targets as two chunks": (50, 2 * CHUNK, 2),
    "a target more than a chunk": (50, CHUNK + 1, 2),
    "two targets more than a chunk": (50, CHUNK + 2, 2),
    "no target": (50, 0, 2),
    "one target": (50, 1, 2),
    "two targets": (50, 2, 2),
    "the fewest tokens": (3, 2, 1),
    "documents as the model's sizes": (200, 31, SIZE),
    "no document": (0, 0, 0),
    "ordinary": (47, 37, 3),
}
FIRST = {
    "meets the model's sizes": (SIZE, SIZE, 2),
    "meets heads": (HEADS, HEADS, 1),
    "is empty": (0, 0, 0),
    "is ordinary": (83, 57, 3),
}
SECOND = 71, 41, 2


def summing_llama(kernel: str, device: torch.device, dtype: torch.dtype, hidden: int) -> PackedModel:
    """As WholeGradients sets one up: layers and head sum the gradients of their weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": SIZE, "hidden_size": hidden, "intermediate_size": hidden, "max_position_embeddings": 32768}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2}
    config = LlamaConfig(**sizes, head_dim=SIZE if device.type == "cuda" else HEADS)  # kernels have a least one
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=registered_name(kernel))
    model = PackedModel(lm.to(device, dtype))
    summing = [module for module in model.decoder_layers().modules() if type(module) is torch.nn.Linear]
    for module in summing:
        module.__class__ = SummingLinear
    for module in (*summing, lm.get_output_embeddings()):
        module.weight_sum = torch.zeros_like(module.weight.data, dtype=torch.float32)
    return model


def step(model: PackedModel, micro_batch: MicroBatch, kernel: str, device: torch.device, reference: bool) -> list:
    """A forward pass without gradients, then one with and its backward pass; log-probabilities and gradients."""
    inputs = model_inputs(micro_batch, kernel, device)
    with torch.no_grad():
        before = model(**inputs)[0] if reference else None
    logps, _ = model(**inputs)
    if before is not None:
        torch.testing.assert_close(before, logps, rtol=0, atol=1e-5 if logps.device.type == "cpu" else 0.1)
    (logps.sum() if len(logps) % 2 else (logps * logps).sum()).backward()  # whose gradient is expanded, or is not
    sums = {name: module.weight_sum.clone() for name, module in model.named_modules() if hasattr(module, "weight_sum")}
    return [logps.detach(), sums]


def drive(kernel, kind, first, device, dtype=torch.float32, recomputed=0, reference=False, hidden=SIZE, more=()) -> int:
    """The first row, the second, ROWS and more; asserts that from the second one on nothing is compiled and, in
    float32, that values are the eager ones. Returns how many graphs there are."""
    torch._dynamo.reset()
    counters.clear()
    eager, compiled = (summing_llama(kernel, device, dtype, hidden) for _ in range(2))
    compiled.compile_layers()
    compiled.checkpoint_activations(recomputed)
    compiled.lm.get_output_embeddings().chunk_rows = CHUNK
    graphs = {}
    for name, sizes in {"first": FIRST[first], "second": SECOND, **ROWS, **dict(more)}.items():
        micro_batch = row(kind, *sizes)
        expected = step(eager, micro_batch, kernel, device, False)
        seen = step(compiled, micro_batch, kernel, device, reference)
        if dtype == torch.float32:
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")
        graphs[name] = counters["stats"]["unique_graphs"]
    # The head first runs for a row that has targets.
    allowed = graphs["second" if FIRST[first][1] == 0 else "first"]
    assert {name: count for name, count in graphs.items() if count > allowed} == {}
    assert not counters["graph_break"]
    return allowed


CPU = torch.device("cpu")


@pytest.fixture
def without_lowering(monkeypatch):
    """What is compiled runs as torch's own operators: the guards are the same, but for the code generator's."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def test_one_graph_of_layers_and_two_of_the_head_serve_every_row(flash_attn):  # noqa: F811
    assert drive("flash_attention_4", SHARED, "meets the model's sizes", CPU) == 3


@pytest.mark.parametrize(
    ("kernel", "kind", "first"),
    [
        ("flash_attention_4", SHARED, "is empty"),
        ("flash_attention_4", PLAIN, "meets the model's sizes"),
        ("sdpa", PLAIN, "meets the model's sizes"),
        ("sdpa", SHARED, "is ordinary"),
    ],
)
def test_no_row_is_a_case_of_its_own_whichever_came_first(flash_attn, without_lowering, kernel, kind, first):  # noqa: F811
    assert drive(kernel, kind, first, CPU) == 3


def test_no_gradients_and_recomputed_layers_are_graphs_of_their_own(flash_attn, without_lowering):  # noqa: F811
    """Of two layers one is recomputed; without gradients that makes a second graph too."""
    assert drive("flash_attention_4", SHARED, "meets heads", CPU, recomputed=1, reference=True) == 6


def test_the_head_compiles_the_same_on_the_thread_of_a_gpus_backward_pass(without_lowering):
    """Which sees none of the settings that the main thread made."""
    torch._dynamo.reset()
    counters.clear()
    head = LogProbHead(torch.nn.Linear(8, SIZE))
    head.compile_arithmetic()

    def run() -> None:
        for targets in (SIZE, 8, 21, 1, 2):
            head(torch.randn(targets, 8), torch.arange(targets)).sum().backward()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert counters["stats"]["unique_graphs"] == 2
