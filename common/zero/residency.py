"""What ZeRO-3 partitions and a rank nevertheless keeps whole during a step, where memory allows (common/zero/memory.py).

Gradients: DeepSpeed by itself copies, casts and reduces every parameter's gradient in every micro-batch, into the
part that this rank owns. WholeGradients keeps a float32 sum as large as the parameter on each rank instead: a linear
layer's backward product is added to it as the matrix product's own accumulation, so that no gradient of its weight
is ever written in bfloat16, and during the last micro-batch each sum is reduced to the ranks' parts.

Parameters: DeepSpeed by itself gathers a layer whenever it runs, and releases it. ResidentParameters gathers all
once a step, each while the layers before it already run.

Both replace, on one instance, methods that DeepSpeed's optimizer calls; what its step reads and writes, the parts of
masters, moments, gradients and parameters that this rank owns, is the same either way. Its step takes one group of
parameters after another (`sub_group_size`): while one is updated the one before is gathered. Their collectives go
through DeepSpeed's own communicator, so that all run in the order in which they were started.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from torch.distributed.distributed_c10d import _coalescing_manager  # one launch for a layer's collectives

from common.model.summing import SummingEmbedding, SummingLinear
from common.zero.adamw import adamw_


def _start(collective: Callable, pairs: list[tuple[torch.Tensor, torch.Tensor]], group, **options) -> list:
    """Starts collective(output, input) of each pair; what to wait for. NCCL launches them as one."""
    if dist.get_backend(group) != "nccl":
        return [collective(*pair, group=group, async_op=True, **options) for pair in pairs]
    with _coalescing_manager(group, async_ops=True) as work:
        for pair in pairs:
            collective(*pair, group=group, **options)
    return [work] if pairs else []


class WholeGradients:
    """Takes over an engine's gradients: what its backward passes leave, and what its step reads.

    Replaced are the optimizer's methods that its hooks call with each parameter whose part in a backward pass is
    over, the one that ends a backward pass, those that update a group of parameters, and the step, after which sums
    are zeroed while the next forward pass runs.
    policy: the engine's common.model.PackedModel, before its layers are compiled. bucket_elements: of the sums that
    are reduced in one go. rounded: where parameters are resident, ResidentParameters' own: an update also rounds the
    masters of its group, and says so there.
    """

    def __init__(self, engine, policy: nn.Module, bucket_elements: int, rounded: set[int] | None):
        self.zero, self.bucket_elements, self.rounded = engine.optimizer, bucket_elements, rounded
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.operation = dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM  # gloo only sums
        # [ranks, elements of a rank's part]: the flattened parameter, padded at the end with zeros, by owner
        self.sums = {
            param: torch.zeros(self.world_size, param.ds_tensor.numel(), dtype=torch.float32, device=engine.device)
            for param in policy.parameters()
        }
        self.ready: list[nn.Parameter] = []  # not yet on their way to their owners
        self.sent: set[nn.Parameter] = set()
        self.works: list = []

        for layer in policy.decoder_layers():
            for module in layer.modules():
                if type(module) is nn.Linear:
                    module.__class__, module.weight_sum = SummingLinear, self._as_parameter(module.weight)
            layer.register_full_backward_hook(self._stand_in, prepend=True)
        embedding, head = policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings()
        if type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq:
            embedding.__class__, embedding.weight_sum = SummingEmbedding, self._as_parameter(embedding.weight)
        head.weight_sum = self._as_parameter(head.weight)

        zero = self.zero
        self.take_step = zero.step
        self.beside = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        policy.register_forward_hook(self._wait_for_zeros)
        zero.reduce_ready_partitions_and_remove_grads = self._take
        zero.independent_gradient_partition_epilogue = self._end_backward
        zero._prepare_sub_group = lambda group, timer_names: None  # which copies gradients into one flat tensor
        zero._optimizer_step = self._update
        zero.step = self._step
        zero.grad_partitions_flat_buffer.untyped_storage().resize_(0)  # of DeepSpeed's own reduction, as what follows
        for bucket in zero.ipg_buckets.values():
            bucket.buffer = None

    def _as_parameter(self, param: nn.Parameter) -> torch.Tensor:
        """The parameter's sum in the parameter's shape."""
        return self.sums[param].view(-1)[: param.ds_numel].view(param.ds_shape)

    def _stand_in(self, layer: nn.Module, *_) -> None:
        """DeepSpeed makes zeros for a layer's parameter without a gradient; one element seen everywhere is enough."""
        for param in layer.parameters():
            if param.grad is None:
                param.grad = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)

    @torch.no_grad()
    def _take(self, param: nn.Parameter) -> None:
        """Called with each parameter whose part in this backward pass is over."""
        grad = param.grad
        if grad is not None and (
            any(grad.stride()) or grad.ndim == 0
        ):  # not _stand_in's; embedding's and head's is None
            self._as_parameter(param).add_(grad)
        param.grad = None
        if self.zero.is_gradient_accumulation_boundary():
            self.ready.append(param)
            if sum(p.ds_numel for p in self.ready) >= self.bucket_elements:
                self._reduce_ready()

    def _reduce_ready(self) -> None:
        """Starts to average the sums over the ranks; each rank gets its part of each, in place."""
        self.sent.update(self.ready)
        if self.world_size > 1:
            wholes = [self.sums[param] for param in self.ready]
            pairs = [(whole[self.rank], whole.view(-1)) for whole in wholes]
            self.works += _start(dist.reduce_scatter_tensor, pairs, self.zero.dp_process_group, op=self.operation)
            if self.operation == dist.ReduceOp.SUM:  # gloo's threads are not to work beside the backward pass
                self._wait()
        self.ready = []

    def _wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works = []

    @torch.no_grad()
    def _end_backward(self) -> None:
        if not self.zero.is_gradient_accumulation_boundary():
            return
        known = {*self.sent, *self.ready}
        self.ready += [param for param in self.sums if param not in known]  # unused this time
        self._reduce_ready()
        self._wait()
        parts = {param: whole[self.rank] for param, whole in self.sums.items()}
        if self.world_size > 1 and self.operation == dist.ReduceOp.SUM:
            torch._foreach_div_(list(parts.values()), self.world_size)
        self.zero.averaged_gradients = {
            i: [parts[param] for param in group] for i, group in enumerate(self.zero.fp16_groups)
        }

    @torch.no_grad()
    def _update(self, group: int) -> None:
        """What the optimizer would do on a flat tensor, on each parameter's stretch of the group's flat masters and
        moments; and rounds the masters to the rank's parts of resident parameters."""
        optimizer, masters = self.zero.optimizer, self.zero.fp32_partitioned_groups_flat[group]
        gradients, self.zero.averaged_gradients[group] = self.zero.averaged_gradients[group], None
        state, options = optimizer.state[masters], optimizer.param_groups[self.zero.sub_group_to_group_id[group]]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(masters), torch.zeros_like(masters)
        state["step"] = state["step"].cpu() + 1  # on the host, which would wait for the device to read it
        sizes = [gradient.numel() for gradient in gradients]
        flats = masters.detach(), state["exp_avg"], state["exp_avg_sq"]
        masters, exp_avgs, exp_avg_sqs = (list(flat.split(sizes)) for flat in flats)
        parts = None
        if self.rounded is not None:
            parts = [part.data for part in self.zero.fp16_partitioned_groups[group]]
            self.rounded.add(group)
        adamw_(masters, gradients, exp_avgs, exp_avg_sqs, parts, int(state["step"]), self.zero.clip_factor, options)

    def _step(self, *arguments, **options) -> None:
        self.take_step(*arguments, **options)
        self.sent.clear()
        if self.beside is not None:
            self.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.beside):  # none: where it is
            torch._foreach_zero_(list(self.sums.values()))

    def _wait_for_zeros(self, *_) -> None:
        """Between a forward pass, which matrix products fill, and its backward pass, which adds to the sums."""
        if self.beside is not None:
            torch.cuda.current_stream().wait_stream(self.beside)


# ---------------------------------------------------------------------- parameters
class ResidentParameters:
    """Keeps every parameter of an engine whole on this rank: gathered here and in each of its steps.

    DeepSpeed's hooks, which gather and release, are removed, and the parts that this rank owns become views of the
    wholes, into which a step rounds the masters; once that is done for all of a layer, it is gathered. A module that
    runs waits for its own parameters only; whoever reads them in another way calls policy.finish_gathering first.
    rounded: groups of which an update has already rounded the masters; those of a checkpoint it has not.
    """

    def __init__(self, engine, policy: nn.Module, rounded: set[int]):
        self.zero, self.world_size, self.rounded = engine.optimizer, dist.get_world_size(), rounded
        offload = self.zero.parameter_offload
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        self.arriving: dict[nn.Module, list] = {}
        group_of = {param: i for i, group in enumerate(self.zero.fp16_groups) for param in group}
        # Of each group the modules whose last parameter is in it, and (whole, part) of each parameter.
        self.last_in: list[list] = [[] for _ in self.zero.fp16_groups]
        for module, params in _by_module(policy):
            pairs = []
            for param in params:  # the ranks' parts one after another
                whole = param.ds_tensor.data.new_empty(self.world_size, param.ds_tensor.numel())
                param.ds_tensor.data = whole[dist.get_rank()].copy_(param.ds_tensor.data)
                param.data = whole.view(-1)[: param.ds_numel].view(param.ds_shape)
                param.ds_status = ZeroParamStatus.AVAILABLE
                pairs.append((whole.view(-1), param.ds_tensor.data))
            self.last_in[max(group_of[param] for param in params)].append((module, pairs))
            module.register_forward_pre_hook(self._wait)
        policy.finish_gathering = self._wait_for_all
        self.zero._partition_all_parameters = self._wait_for_all
        self.zero._reassign_or_swap_out_partitioned_parameters = self._round_masters
        masters = {master.untyped_storage().data_ptr() for master in self.zero.fp32_partitioned_groups_flat}
        if (parts := self.zero.lp_param_buffer.untyped_storage()).data_ptr() not in masters:  # as float32's are
            parts.resize_(0)
        for group in range(len(self.last_in)):
            self._gather(group)

    @torch.no_grad()
    def _round_masters(self, group: int) -> None:
        if group in self.rounded:
            self.rounded.remove(group)
        else:
            parts = [part.data for part in self.zero.fp16_partitioned_groups[group]]
            masters = self.zero.fp32_partitioned_groups_flat[group].split([part.numel() for part in parts])
            torch._foreach_copy_(parts, list(masters))
        self._gather(group)

    @torch.no_grad()
    def _gather(self, group: int) -> None:
        """Starts to gather the modules of which the ranks' parts are now all rounded."""
        if self.world_size > 1:
            for module, pairs in self.last_in[group]:
                self.arriving[module] = _start(dist.all_gather_into_tensor, pairs, self.zero.dp_process_group)

    def _wait(self, module: nn.Module, _) -> None:
        for work in self.arriving.pop(module, ()):
            work.wait()

    def _wait_for_all(self) -> None:
        for module in list(self.arriving):
            self._wait(module, None)


def _by_module(policy: nn.Module) -> Iterable[tuple[nn.Module, list[nn.Parameter]]]:
    """(module that needs them first, its parameters), in the order in which modules are defined: layers as wholes."""
    layers, seen = set(policy.decoder_layers()), set()
    inside = {module for layer in layers for module in layer.modules()} - layers
    for module in policy.modules():
        if module in inside:
            continue
        params = [p for p in module.parameters(recurse=module in layers) if p not in seen]
        seen.update(params)
        if params:
            yield module, params
