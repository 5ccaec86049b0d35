"""A causal LM that runs on packed rows and answers for their targets."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx.experimental import _config as fx_config
from torch.utils.checkpoint import checkpoint

from common.data.tokens import SFTSample
from common.failures import UserError, as_user_error
from common.model.attention import KERNELS, WINDOWS, attention_kwargs, registered_name, to_device
from common.model.experts import GROUPED, experts_per_token, part_met, router_loss, sequence_weights
from common.model.logprobs import LogProbHead
from common.model.recurrent import by_segment, stateful_modules
from common.ranks import Ranks
from common.step.packing import MicroBatch, pack, sft_documents

ACTIVATION_MEMORY_BUDGET = 0.8  # at this a compiled layer keeps no outputs of norms and activation functions


def final_logits(lm: nn.Module) -> tuple[float, float]:
    """(scale, soft cap, 0 for none) that a model's output layer puts on its projection's logits."""
    config = lm.config.get_text_config()
    scale = getattr(lm, "logit_scale", None) or 1.0  # of the class: some around a text part of that config scale none
    for name in ("lm_head_multiplier", "output_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None) or 0.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0), cap


class PackedModel(nn.Module):
    """A causal LM that answers for the targets of one packed row.

    forward(input_ids, position_ids int64 [1, T], target_rows, target_ids int64 [N], row, **attention) -> (float32 [N],
    log p(target_ids[n] | hidden state of row target_rows[n]); float32 [], the routers' balancing loss of this row with
    `sequences` float32 [Q, T] (see sequence_weights), else 0). attention: see attention_kwargs. Layers that carry a
    state run on the segments of `row`, the MicroBatch, which stands until the next forward pass: its layers may be
    computed again.
    forward(input_ids int64 [B, L]) -> logits [B, L, vocab_size], by transformers' own path.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm, self.config = lm, lm.config.get_text_config()
        self.is_compiled = False
        self.row: MicroBatch | None = None
        self.stateful = stateful_modules(self.decoder)
        for module in self.stateful:
            module.forward = by_segment(module.forward, lambda: self.row)
        self.finish_gathering: Callable[[], None] = lambda: None  # common/zero/residency.py
        lm.set_output_embeddings(LogProbHead(lm.get_output_embeddings(), *final_logits(lm)))
        lm.train()

    def forward(
        self, input_ids, position_ids=None, target_rows=None, target_ids=None, sequences=None, row=None, **attention
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        self.row = row
        if target_rows is None:
            types = {"token_type_ids", "mm_token_type_ids"} & inspect.signature(self.lm.forward).parameters.keys()
            all_text = {} if self.config is self.lm.config else dict.fromkeys(types, torch.zeros_like(input_ids))
            return self.lm(input_ids=input_ids, use_cache=False, **all_text).logits
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        inputs |= {} if sequences is None else {"output_router_logits": True}
        outputs = self.decoder(**inputs, **attention)
        balance = torch.zeros((), device=input_ids.device)
        if sequences is not None:
            balance = router_loss(outputs.router_logits, sequences, experts_per_token(self.config))
        hidden = outputs.last_hidden_state[0][target_rows].to(self.lm.dtype)  # some add up in float32
        return self.lm.get_output_embeddings()(hidden, target_ids), balance

    @property
    def decoder(self) -> nn.Module:
        """What maps tokens to hidden states; of a model with other parts, its text decoder."""
        return self.lm.base_model if self.config is self.lm.config else self.lm.get_decoder()

    def decoder_layers(self) -> nn.ModuleList:
        """The repeated layers, first to last. Raises UserError if there is no list of them."""
        num_layers = self.config.num_hidden_layers
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return module
        raise UserError(f"model type {self.lm.config.model_type} is not supported: it has no list of its layers")

    def compile_layers(self) -> None:
        """Compiles the decoder layers, all into one graph, and the head's arithmetic, for rows of any length."""
        self.is_compiled = True
        functorch_config.activation_memory_budget = ACTIVATION_MEMORY_BUDGET
        dynamo_config.specialize_float = True  # else each is a tensor on the CPU, for which C++ may be compiled
        fx_config.use_duck_shape = False  # else sizes that are equal in the first row must be so in every row
        # Else a norm's backward pass on a GPU is compiled again for rows beyond limits that follow from its width.
        inductor_config.triton.mix_order_reduction_non_strict_mode = True
        layers = self.decoder_layers()
        dynamo_config.recompile_limit = len(layers) + 8  # where a layer's numbers follow from its place, as DiffLlama's
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        self.lm.get_output_embeddings().compile_arithmetic()

    def checkpoint_activations(self, num_layers: int) -> None:
        """The first `num_layers` layers' activations are computed again in the backward pass, the others' kept."""
        for i, layer in enumerate(self.decoder_layers()):
            layer.gradient_checkpointing = i < num_layers
            layer._gradient_checkpointing_func = lambda f, *args: checkpoint(f, *args, use_reentrant=False)

    def layers_report(self) -> dict:
        """What --gradient_checkpointing and --compile_layers came to."""
        layers = self.decoder_layers()
        recomputed = sum(layer.gradient_checkpointing for layer in layers)
        return {"number": len(layers), "recomputed": recomputed, "compiled": self.is_compiled}


def model_inputs(micro_batch: MicroBatch, kernel: str, device: torch.device, router_coefficient: float = 0) -> dict:
    """A micro-batch as PackedModel's arguments, on the device; with its sequences if the routers have a loss."""
    arrays = {"input_ids": micro_batch.input_ids[None], "position_ids": micro_batch.position_ids[None]}
    arrays |= {"target_rows": micro_batch.target_rows, "target_ids": micro_batch.target_ids}
    arrays |= {"sequences": sequence_weights(micro_batch)} if router_coefficient else {}
    tensors = {name: to_device(array, device) for name, array in arrays.items()}
    return tensors | attention_kwargs(micro_batch, kernel, device) | {"row": micro_batch}


@contextmanager
def _short_windows(lm: nn.Module, kernel: str, length: int) -> Iterator[None]:
    """Sliding windows see `length` tokens meanwhile, so that a short sample is longer than one; not where the kernel
    has none, which is then taken only where no sample is longer than one."""
    holders = [*lm.modules(), *{id(m.config): m.config for m in lm.modules() if hasattr(m, "config")}.values()]
    before = [(holder, holder.sliding_window) for holder in holders if getattr(holder, "sliding_window", None)]
    before = before if WINDOWS in KERNELS[kernel][1] else []
    try:
        for holder, _ in before:
            holder.sliding_window = length
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


def verify_packed_model(engine, kernel: str, ranks: Ranks, is_trained: bool = True) -> None:
    """Runs two made-up samples in one row, each in a row of its own, and each through transformers' own attention,
    experts and output layers.

    Compares log-probabilities and, of a model that is trained, their sum's gradient of the embeddings; no gradient of a
    weight is computed. Catches what no list of names can: an architecture that lets samples see each other, or whose
    logits are not its output projection of its decoder's last hidden state. Raises UserError. Collective.
    """
    lm, config, embeddings = engine.module.lm, engine.module.config, []
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(config.vocab_size, (n,), generator=generator).numpy() for n in (24, 17)]

    def cut(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1].clone()  # which a model may change in place

    def gradient(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = embeddings.pop()
        of_output = torch.autograd.grad(logps.sum(), output)[0] if is_trained else torch.ones_like(output)
        return logps.detach(), of_output[0]

    def in_one_row(*together: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        row = pack([sft_documents(SFTSample(ids, np.array([[len(ids) // 2, len(ids)]]))) for ids in together])
        return gradient(engine(**model_inputs(row, kernel, ranks.device))[0])

    def by_transformers(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.from_numpy(ids)[None].to(ranks.device)
        logps = engine(tokens)[0, :-1].float().log_softmax(-1)
        return gradient(logps.gather(1, tokens[0, 1:, None])[len(ids) // 2 - 1 :, 0])

    parameters, hook = list(lm.parameters()), lm.get_input_embeddings().register_forward_hook(cut)
    engine.set_gradient_accumulation_boundary(False)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        what = f"model type {lm.config.model_type} cannot be run"
        with _short_windows(lm, kernel, 8), as_user_error(what), torch.set_grad_enabled(is_trained):
            packed, apart = in_one_row(*samples), [in_one_row(ids) for ids in samples]
            engine.module.decoder.set_attn_implementation("eager")
            config._experts_implementation = "eager"
            plain = [by_transformers(ids) for ids in samples]
    finally:
        hook.remove()
        engine.module.decoder.set_attn_implementation(registered_name(kernel))
        config._experts_implementation = GROUPED
        for parameter in parameters:
            parameter.grad = None  # what common/zero/residency.py puts there
            parameter.requires_grad_(True)
    seen = [packed, *([torch.cat(values) for values in zip(*parts, strict=True)] for parts in (apart, plain))]
    allowed = (1e-3, 1e-3) if lm.dtype == torch.float32 else (0.1, 0.5)
    may_reroute = lm.dtype != torch.float32 and part_met(config, ".experts.") < 1
    for (logps, gradients), (expected, of_expected), what in (
        (seen[0], seen[1], "in one row differ from those in rows of their own"),
        (seen[1], seen[2], "in a row of their own differ from transformers' own"),
    ):
        differences = (logps - expected).abs()
        of_tokens, norms = ((gradients - of_expected).float().norm(dim=-1), of_expected.float().norm(dim=-1))
        difference, of_gradient = differences.mean(), of_tokens.norm() / norms.norm()
        if may_reroute and expected is seen[2][0]:  # rounded in another way, a token goes to other experts now and then
            difference, of_gradient = differences.median(), (of_tokens / norms)[norms > 0].median()
        if not of_expected.isfinite().all():  # whatever makes it so, it is not how samples are packed
            of_gradient = torch.zeros(())
        if not (difference <= allowed[0] and of_gradient <= allowed[1]):
            told = f"log-probabilities of samples {what} by {difference:.3g} a token, gradients by {of_gradient:.1%}"
            is_finite = expected.isfinite().all()
            why = "this architecture needs code that is not here" if is_finite else "look at the weights"
            raise UserError(f"model type {lm.config.model_type}: {told}; {why}")
