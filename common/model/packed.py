"""A causal LM that runs on packed rows and answers for their targets."""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.fx.experimental import _config as fx_config
from torch.utils.checkpoint import checkpoint

from common.data.tokens import SFTSample
from common.failures import UserError
from common.model.attention import attention_kwargs, registered_name, to_device
from common.model.experts import GROUPED, experts_in, experts_per_token, router_loss, sequence_weights
from common.model.logprobs import LogProbHead
from common.ranks import Ranks
from common.step.packing import MicroBatch, pack, sft_documents

ACTIVATION_MEMORY_BUDGET = 0.8  # at this a compiled layer keeps no outputs of norms and activation functions


class PackedModel(nn.Module):
    """A causal LM that answers for the targets of one packed row.

    forward(input_ids, position_ids int64 [1, T], target_rows, target_ids int64 [N], **attention) -> float32 [N],
    log p(target_ids[n] | hidden state of row target_rows[n]); attention: see attention_kwargs. With `sequences`
    float32 [Q, T] (see sequence_weights) `router_loss` is then that of this row, else 0.
    forward(input_ids int64 [B, L]) -> logits [B, L, vocab_size], by transformers' own path.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.is_compiled = False
        self.router_loss = torch.zeros(())
        self.finish_gathering: Callable[[], None] = lambda: None  # common/zero/residency.py
        lm.set_output_embeddings(LogProbHead(lm.get_output_embeddings()))
        assert "position_ids" in inspect.signature(lm.base_model.forward).parameters
        lm.train()

    def forward(
        self, input_ids, position_ids=None, target_rows=None, target_ids=None, sequences=None, **attention
    ) -> torch.Tensor:
        if target_rows is None:
            return self.lm(input_ids=input_ids, use_cache=False).logits
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if sequences is not None:
            inputs["output_router_logits"] = True
        outputs = self.lm.base_model(**inputs, **attention)
        self.router_loss = torch.zeros((), device=input_ids.device)
        if sequences is not None:
            self.router_loss = router_loss(outputs.router_logits, sequences, experts_per_token(self.lm.config))
        return self.lm.get_output_embeddings()(outputs.last_hidden_state[0][target_rows], target_ids)

    def decoder_layers(self) -> nn.ModuleList:
        """The repeated layers, first to last. Raises UserError if there is no list of them."""
        num_layers = self.lm.config.num_hidden_layers
        for module in self.lm.base_model.modules():
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
    return tensors | attention_kwargs(micro_batch, kernel, device)


@torch.no_grad()
def verify_packed_forward(engine, kernel: str, ranks: Ranks) -> None:
    """Runs two made-up samples packed and, one at a time, through transformers' own attention, experts and output.

    Catches what no list of names can: an architecture that lets samples see each other, or whose logits are
    not its output projection of its decoder's last hidden state. Raises UserError. Collective.
    """
    config = engine.module.lm.config
    generator = torch.Generator().manual_seed(0)
    longest = getattr(config, "sliding_window", None) or 24
    lengths = (min(n, longest) for n in (24, 17))
    samples = [torch.randint(config.vocab_size, (n,), generator=generator).numpy() for n in lengths]
    row = pack([sft_documents(SFTSample(ids, np.array([[len(ids) // 2, len(ids)]]))) for ids in samples])
    packed = engine(**model_inputs(row, kernel, ranks.device))
    config._attn_implementation = "sdpa" if getattr(engine.module.lm, "_supports_sdpa", False) else "eager"
    config._experts_implementation = "grouped_mm"
    alone = []
    for ids in samples:
        tokens = torch.from_numpy(ids)[None].to(ranks.device)
        logps = engine(tokens)[0, :-1].float().log_softmax(-1)
        alone.append(logps.gather(1, tokens[0, 1:, None])[max(0, len(ids) // 2 - 1) :, 0])
    config._attn_implementation, config._experts_implementation = registered_name(kernel), GROUPED
    alone = torch.cat(alone)
    differences = (packed - alone).abs()
    difference = differences.mean().item()
    if engine.module.lm.dtype != torch.float32 and experts_in(engine.module.lm):
        # Where two experts are almost alike to a router, rounding decides, and one token differs by far more than
        # rounding. Whatever leaks differs in most tokens of a sample.
        difference = max(of_sample.median().item() for of_sample in differences.split(row.sequence_targets))
    if not difference <= (1e-3 if engine.module.lm.dtype == torch.float32 else 0.1):
        told = f"packed log-probabilities differ from transformers' own by {difference:.3g} a token"
        why = "this architecture needs code that is not here" if alone.isfinite().all() else "look at the weights"
        raise UserError(f"model type {config.model_type}: {told}; {why}")
