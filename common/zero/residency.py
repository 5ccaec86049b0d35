"""What ZeRO-3 partitions and a rank nevertheless keeps whole during a step; the one home of DeepSpeed's own names.

nothing    As DeepSpeed does it: each micro-batch gathers a layer when it runs, and copies, casts and reduces every
           gradient into the shard that this rank owns.
gradients  WholeGradients: each rank holds a float32 sum as large as the parameter, to which a linear layer's (or an
           expert's) backward product is added as the matrix product's own accumulation: no gradient of its weight is
           ever written in bfloat16. During a step's last micro-batch each sum is reduced to the ranks' shards.
all        ResidentParameters, besides: parameters are gathered once a step, each while the layers before it run.

Methods that DeepSpeed calls are replaced, on one instance; what its step reads and writes, this rank's shards, stays
the same. The step updates one group of parameters after another (`sub_group_size`): while one is updated the one before
is gathered. All collectives go through DeepSpeed's communicator, and so run in the order in which they were started.
Where parameters are kept whole a step runs on a stream of its own on a GPU, and a module of the next forward pass waits
for its own parameters only, while groups whose state lies in host memory (common/zero/host_state.py) are under way.

Undocumented names of engine.optimizer, DeepSpeed's ZeRO-3 optimizer  -> what DeepSpeed does: what is done here
  fp16_groups, fp16_partitioned_groups         -> parameters and their shards, by group: read
  fp16_partitioned_groups_flat                 -> the shards of each group, flat: read
  fp32_partitioned_groups_flat                 -> master weights of a group, or what rounding lost: made here, updated
  _create_fp32_partitions, initialize_optimizer_states -> makes them, and gradients: replaced, moments are made too
  runtime.compiler.compile                     -> decorates kernels of Muon, which is not used: replaced by nothing
  defragment                                   -> makes shards one by way of host memory: replaced, stays on the device
  optimizer, sub_group_to_group_id             -> torch's AdamW, its group of options: moments set, updated
  averaged_gradients                           -> shards of the gradient, by group: read; set to those of the sums
  dp_process_group                             -> communicator of all ranks
  clip_grad, _global_grad_norm                 -> --max_grad_norm; the norm before clipping: read; set
  _get_norm_groups, unscale_and_clip_grads     -> norm; scaling of a group's gradient: replaced by Update's
  step                                         -> norm and updates: run on a stream of their own
  is_gradient_accumulation_boundary            -> is this the step's last backward pass: called
  reduce_ready_partitions_and_remove_grads     -> a gradient is there: replaced, added to the parameter's sum
  independent_gradient_partition_epilogue      -> a backward pass ends: replaced, sums are reduced
  _prepare_sub_group, _optimizer_step          -> copies a group's gradient; updates it: replaced by update_group
  _reassign_or_swap_out_partitioned_parameters -> rounds a group's master weights: replaced; if resident, gathers them
  _partition_all_parameters                    -> releases what is whole before a step: if resident, waits for it
  _post_step                                   -> ends a step: called once weights are loaded
  parameter_offload.{forward,backward}_hooks   -> gather and release modules: removed if resident
  lp_param_buffer, grad_partitions_flat_buffer, ipg_buckets -> memory of shards, of its own reduction: freed if unused
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from torch.distributed.distributed_c10d import _coalescing_manager  # one launch for a layer's collectives

from common.failures import UserError
from common.model.experts import experts_in
from common.model.summing import SummingEmbedding, SummingLinear
from common.zero import host_state
from common.zero.host_state import Buffer, Carrier, HostMemory, Shard
from common.zero.opening import LAYERS_BETWEEN, Opening

DEEPSPEED = "0.19.8"


def require_known_deepspeed() -> None:
    """Raises UserError for another version of DeepSpeed than the names above are of."""
    if deepspeed.__version__ != DEEPSPEED:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} is not {DEEPSPEED}, which is needed; run: bash run.sh setup"
        )


# ------------------------------------------------------------------ what other files ask of DeepSpeed
def weights_are_finite(engine) -> bool:
    """Whether this rank's shards of the model's weights are, after the last update."""
    engine.module.finish_gathering()
    engine.updater.carrier.wait_until_written()  # and so leaves memory for what is computed here
    shards = [shard for group in engine.optimizer.fp16_partitioned_groups for shard in group]
    return all(bool(piece.isfinite().all()) for shard in shards for piece in shard.split(host_state.CHUNK_ELEMENTS))


def set_step(engine, step: int) -> None:
    """Gives every group the number of steps that its moments are of. State and weights may be written after that."""
    engine.module.finish_gathering()  # into memory of which the shards are a part
    engine.updater.carrier.wait_until_written()
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(step)


def state_shards(engine) -> dict[nn.Parameter, Shard]:
    """This rank's shard of each parameter and of its state, which an update no longer writes to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    zero = engine.optimizer
    shards: dict[nn.Parameter, Shard] = {}
    for group, params in enumerate(zero.fp16_groups):
        weights = [shard.data for shard in zero.fp16_partitioned_groups[group]]
        split = (flat.split([len(weight) for weight in weights]) for flat in _state(zero, group))
        shards |= {param: Shard(*views) for param, *views in zip(params, weights, *split, strict=True)}
    return shards


def _state(zero, group: int) -> tuple[torch.Tensor, ...]:
    """A group's master weights, or what their rounding has lost, exp_avg and exp_avg_sq: each flat, of all shards."""
    flat = zero.fp32_partitioned_groups_flat[group]
    return flat.detach(), zero.optimizer.state[flat]["exp_avg"], zero.optimizer.state[flat]["exp_avg_sq"]


def round_master_weights(engine) -> None:
    """Rounds master weights that have been set to the model's own, as the end of a step does. Collective."""
    zero = engine.optimizer
    zero._partition_all_parameters()
    for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if flat.dtype == torch.float32:  # else setting them has rounded them (see Shard.write)
            shards = [shard.data for shard in zero.fp16_partitioned_groups[group]]
            torch._foreach_copy_(shards, list(flat.detach().split([shard.numel() for shard in shards])))
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # with this, and with threads' streams, of which the step's gets no memory
        torch.cuda.empty_cache()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    zero._post_step(set())


# ------------------------------------------------------------------ the optimizer's state
def group_sizes(shard_sizes: list[int], sub_group_size: int) -> list[int]:
    """Elements of each of DeepSpeed's groups: consecutive shards, closed once they hold sub_group_size elements."""
    if sub_group_size >= sum(shard_sizes):
        return [sum(shard_sizes)]
    sizes, size = [], 0
    for shard in shard_sizes:
        size += shard
        if size >= sub_group_size:
            sizes.append(size)
            size = 0
    return [*sizes, size] if size else sizes


@contextmanager
def own_state(share_on_device: float, host: HostMemory | None) -> Iterator[None]:
    """While an engine is made, its master weights and moments are made here, and those of the last groups in `host`.

    DeepSpeed would make all of them on the device first. None: host memory is taken as it is needed.
    """

    def create(zero) -> None:
        sizes = [flat.numel() for flat in zero.fp16_partitioned_groups_flat]
        zero.num_on_device = host_state.num_on_device(sizes, share_on_device)
        itemsize = zero.fp16_partitioned_groups_flat[0].itemsize
        needed = sum(host_state.words(size, itemsize) for size in sizes[zero.num_on_device :])
        memory = host or HostMemory(needed, torch.device(zero.device))
        memory.wait_until_pinned()
        for group, shards in enumerate(zero.fp16_partitioned_groups_flat):
            if group < zero.num_on_device:
                flat = shards.to(zero.device, copy=itemsize == 4)
                moments = [torch.zeros_like(flat, dtype=torch.float32) for _ in range(2)]
                if itemsize == 2:  # the weights have lost nothing yet
                    flat = torch.zeros_like(flat, dtype=torch.int16)
            else:
                taken = memory.take(host_state.words(sizes[group], itemsize))
                flat, *moments = host_state.places_in(taken, sizes[group], itemsize, sizes[group])
                if flat.dtype == torch.float32:  # else the weights have lost nothing yet
                    flat.copy_(shards)
            zero.fp32_partitioned_groups_flat.append(flat)
            step = torch.zeros((), device=zero.device)
            zero.optimizer.state[flat] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        for options in zero.optimizer.param_groups:
            options["params"] = []

    def join(shards: list[torch.Tensor]) -> torch.Tensor:
        joined = shards[0].new_empty(sum(shard.numel() for shard in shards))
        for shard, there in zip(shards, joined.split([shard.numel() for shard in shards]), strict=True):
            shard.data = there.copy_(shard.data)
        return joined

    with (
        patch.object(stage3.DeepSpeedZeroOptimizer_Stage3, "_create_fp32_partitions", create),
        patch.object(stage3.DeepSpeedZeroOptimizer_Stage3, "initialize_optimizer_states", lambda zero: None),
        patch.object(stage3, "defragment", join),
        # Importing Muon, which is no part of this, would prepare its kernels for compilation: more than a second.
        patch.object(compiler, "compile", lambda: lambda function: function),
    ):
        yield


# ------------------------------------------------------------------ the update
def update_group(weights, gradients, exp_avgs, exp_avg_sqs, step: torch.Tensor, divisor: float, options: dict) -> None:
    """One update of a group's master weights and moments, in place, by torch's own fused AdamW.

    The first four: lists of float32 [n], a shard of each parameter, on one device. step: float32 [], 1 for the first.
    Gradients are divided by divisor, and used up. options: lr, betas, eps and weight_decay of an optimizer's group.
    """
    numbers = {name: options[name] for name in ("lr", "weight_decay", "eps")} | {"amsgrad": False, "maximize": False}
    numbers["beta1"], numbers["beta2"] = options["betas"]
    numbers["grad_scale"] = torch.full_like(step, divisor) if divisor > 1 else None
    torch._fused_adamw_(weights, gradients, exp_avgs, exp_avg_sqs, [], [step] * len(weights), **numbers)


class Update:
    """An engine's step: the gradient's norm, AdamW on each group's shards, wherever their state lies, and its rounding.

    Gradients are divided by max(1, (norm + 1e-6) / max_grad_norm), as by torch's clip_grad_norm_; not where
    max_grad_norm is 0. It is one float32 number whatever is kept whole, so that this does not change the update's bits.
    """

    def __init__(self, engine, policy: nn.Module, keeps_gradients: bool, keeps_weights: bool):
        self.zero, self.policy, self.divisor = engine.optimizer, policy, 1.0
        self.keeps_gradients, self.keeps_weights = keeps_gradients, keeps_weights
        self.carrier = Carrier(engine.device)
        self.when_updated: Callable[[int], None] = lambda group: None
        self.stream = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        zero = self.zero
        if keeps_gradients:  # before whole weights and sums take memory
            zero.grad_partitions_flat_buffer.untyped_storage().resize_(0)
            for bucket in zero.ipg_buckets.values():
                bucket.buffer = None
        for group in range(zero.num_on_device, len(zero.fp16_groups)):
            self.carrier.add(group, _state(zero, group), [shard.numel() for shard in self._shards(group)])
        self.carrier.make_ring()
        for layer in policy.decoder_layers():
            layer.register_forward_pre_hook(lambda *_: self.carrier.give_up())
        self.take_step = zero.step
        zero.step = self._step
        zero._get_norm_groups = self._norm
        zero.unscale_and_clip_grads = self._clip
        zero._prepare_sub_group = lambda group, timer_names: None
        zero._optimizer_step = self._update
        zero._reassign_or_swap_out_partitioned_parameters = lambda group: None  # _update has rounded them

    def _shards(self, group: int) -> list[torch.Tensor]:
        """A group's weights on this rank, each one-dimensional: as one, where DeepSpeed keeps them flat."""
        if not self.keeps_gradients:
            return [self.zero.fp16_partitioned_groups_flat[group].data]
        return [shard.data for shard in self.zero.fp16_partitioned_groups[group]]

    def _gradients(self, group: int) -> list[torch.Tensor]:
        """Those of _shards."""
        gradients, self.zero.averaged_gradients[group] = self.zero.averaged_gradients[group], None
        if self.keeps_gradients:
            return gradients
        sizes = [flat.numel() for flat in self.zero.fp32_partitioned_groups_flat]
        return [self.zero.grad_partitions_flat_buffer.split(sizes)[group]]

    def _norm(self) -> list[torch.Tensor]:
        """[float64]: 2-norm over all ranks, -1 if it is not finite. DeepSpeed's own makes copies in float64."""
        gradients = [shard for i in range(len(self.zero.fp16_groups)) for shard in self.zero.averaged_gradients[i]]
        square = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).square().sum()
        dist.all_reduce(square, group=self.zero.dp_process_group)
        return [torch.where(square.isfinite(), square.sqrt(), -1.0)]

    def _clip(self, group: int, norm: torch.Tensor) -> None:
        if group == 0:  # the host waits for the norm once, before an update is under way
            self.zero._global_grad_norm = norm = float(norm)
            self.divisor = max(1.0, (norm + 1e-6) / self.zero.clip_grad) if self.zero.clip_grad > 0 else 1.0

    def _step(self, *arguments, **options) -> None:
        self.carrier.bring()
        stream = self.stream if self.keeps_weights else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # none: where it is
            self.take_step(*arguments, **options)
        if self.stream is not None and stream is None:  # DeepSpeed gathers weights on a stream that does not wait
            torch.cuda.current_stream().synchronize()
        self.carrier.end_step()

    @torch.no_grad()
    def _update(self, group: int) -> None:
        """update_group on each parameter's stretch of the group's flat master weights and moments, then rounds them."""
        zero, flat = self.zero, self.zero.fp32_partitioned_groups_flat[group]
        options = zero.optimizer.param_groups[zero.sub_group_to_group_id[group]]
        step = zero.optimizer.state[flat]["step"].add_(1)
        gradients, shards = self._gradients(group), self._shards(group)
        in_one = host_state.compiled if self.policy.is_compiled else lambda function: function
        if group in self.carrier.by_group:
            chunks = self.carrier.carry(group)
        else:
            numels = [shard.numel() for shard in shards]
            chunks = ((c, c.state) for c in host_state.chunks_of(_state(zero, group), numels))
        for chunk, (kept, exp_avg, exp_avg_sq) in chunks:
            sizes = [end - start for _, start, end in chunk.pieces]
            rounded = [shards[i][start:end] for i, start, end in chunk.pieces]
            is_whole = kept.dtype == torch.float32
            master = kept
            if not is_whole:
                master = in_one(host_state.put_together)(torch.cat(rounded).to(kept.device), kept, exp_avg_sq)
            parts = [gradients[i][start:end] for i, start, end in chunk.pieces]
            weights, exp_avgs, exp_avg_sqs = (list(x.split(sizes)) for x in (master, exp_avg, exp_avg_sq))
            update_group(weights, parts, exp_avgs, exp_avg_sqs, step, self.divisor, options)
            torch._foreach_copy_(rounded, weights)
            if not is_whole:
                in_one(host_state.take_apart)(master, torch.cat(rounded).to(kept.device), kept, exp_avg_sq)
        self.when_updated(group)


def _start(collective: Callable, pairs: list[tuple[torch.Tensor, torch.Tensor]], group, **options) -> list:
    """Starts collective(output, input) of each pair; what to wait for. NCCL launches them as one."""
    if dist.get_backend(group) != "nccl":
        return [collective(*pair, group=group, async_op=True, **options) for pair in pairs]
    with _coalescing_manager(group, async_ops=True) as work:
        for pair in pairs:
            collective(*pair, group=group, **options)
    return [work] if pairs else []


# ------------------------------------------------------------------ gradients
@dataclass
class Sums:
    """The gradient sums of a layer, or of a parameter outside of layers, one after another in one memory."""

    memory: torch.Tensor  # float32 [elements, what aligns them included]
    params: list[nn.Parameter]
    num_lent: int = 0  # elements at the beginning of memory that hold chunks of the optimizer's state
    lent: list[Buffer] = field(default_factory=list)
    updated: "torch.cuda.Event | None" = None  # once an update has read them
    is_used: bool = False  # may hold activations, and is zeroed after the backward passes that need these
    zeroed: "torch.cuda.Event | None" = None


class WholeGradients:
    """Takes over an engine's gradients: what its backward passes leave, and what its step reads.

    What other ranks own of the sums of the model's second half takes state from host memory once it is reduced. What is
    left takes activations of the next step's first micro-batch (common/zero/opening.py), if `opens` is set. Sums are
    zeroed while the next forward pass runs; those that hold activations then beside the backward pass, before their
    layer's.
    policy: the engine's common.model.PackedModel, before its layers are compiled. update: the engine's.
    """

    def __init__(self, engine, policy: nn.Module, update: Update):
        self.zero, self.carrier = engine.optimizer, update.carrier
        self.bucket_elements = engine.zero_reduce_bucket_size()
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.operation = dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM  # gloo only sums
        # [ranks, elements of a shard]: the flattened parameter, padded at the end with zeros, by owner
        self.sums: dict[nn.Parameter, torch.Tensor] = {}
        self.shards: dict[nn.Parameter, torch.Tensor] = {}  # this rank's, once reduced
        layers, self.of_layer, self.others = policy.decoder_layers(), {}, []
        for module, params in _by_module(policy):
            sums = self._make_sums(params, engine.device)
            if module in layers:
                self.of_layer[module] = sums
            else:
                self.others.append(sums)
        self.layers, self.opens = list(layers), False
        self.opening = Opening(policy, layers, self._lend_to_activations)
        self.opening.left_alone |= {sums.memory.untyped_storage().data_ptr() for sums in self.of_layer.values()}
        self.unseen = set(self.sums)  # in this step's last backward pass
        self.ready: list[nn.Parameter] = []  # not yet on their way to their owners
        self.reducing: list[tuple[list, list[nn.Parameter]]] = []  # what to wait for, of which parameters

        for layer in layers:
            for module in layer.modules():
                if type(module) is nn.Linear:
                    module.__class__, module.weight_sum = SummingLinear, self._as_parameter(module.weight)
            for module in experts_in(layer):
                module.weight_sums = {name: self._as_parameter(p) for name, p in module.named_parameters(recurse=False)}
            layer.register_full_backward_pre_hook(self._wait_for_zeros)
            layer.register_full_backward_hook(self._stand_in, prepend=True)
        embedding, head = policy.lm.get_input_embeddings(), policy.lm.get_output_embeddings()
        if type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq:
            embedding.__class__, embedding.weight_sum = SummingEmbedding, self._as_parameter(embedding.weight)
        head.weight_sum = self._as_parameter(head.weight)

        self.take_step = self.zero.step
        self.beside = update.stream
        policy.register_forward_hook(lambda *_: self._wait_for_zeros())
        self.zero.reduce_ready_partitions_and_remove_grads = self._take
        self.zero.independent_gradient_partition_epilogue = self._end_backward
        self.zero.step = self._step
        group_of = {param: i for i, group in enumerate(self.zero.fp16_groups) for param in group}
        self.last_in: list[list[Sums]] = [[] for _ in self.zero.fp16_groups]
        for sums in self.of_layer.values():
            self.last_in[max(group_of[param] for param in sums.params)].append(sums)
        update.when_updated = self._note_updated

    def _make_sums(self, params: list[nn.Parameter], device: torch.device) -> Sums:
        numels = [self.world_size * param.ds_tensor.numel() for param in params]
        taken = [-(-numel // host_state.ALIGNED) * host_state.ALIGNED for numel in numels]
        memory = torch.zeros(sum(taken), dtype=torch.float32, device=device)
        for param, numel, start in zip(params, numels, memory.split(taken), strict=True):
            self.sums[param] = start[:numel].view(self.world_size, -1)
        return Sums(memory, params)

    def _as_parameter(self, param: nn.Parameter) -> torch.Tensor:
        """The parameter's sum in the parameter's shape."""
        return self.sums[param].view(-1)[: param.ds_numel].view(param.ds_shape)

    def _stand_in(self, layer: nn.Module, *_) -> None:
        """DeepSpeed makes zeros for a layer's parameter without a gradient; one element seen everywhere is enough."""
        for param in layer.parameters():
            if param.grad is None:
                param.grad = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)
        if self.zero.is_gradient_accumulation_boundary() and self.world_size == 1:
            self.carrier.bring(in_free_memory=True)  # the layer's activations are no longer needed

    @torch.no_grad()
    def _take(self, param: nn.Parameter) -> None:
        """Called with each parameter whose part in this backward pass is over."""
        grad = param.grad  # None: the embedding's and the head's. Without strides: _stand_in's
        if grad is not None and (any(grad.stride()) or grad.ndim == 0):
            self._as_parameter(param).add_(grad)
        param.grad = None
        if self.zero.is_gradient_accumulation_boundary():
            self.unseen.discard(param)
            self.ready.append(param)
            if sum(p.ds_numel for p in self.ready) >= self.bucket_elements:
                self._reduce_ready()

    def _reduce_ready(self) -> None:
        """Starts to average the sums over the ranks, in place; takes each rank's shards of those before."""
        works, before = [], self.reducing
        if self.world_size > 1:
            pairs = [(self.sums[param][self.rank], self.sums[param].view(-1)) for param in self.ready]
            works = _start(dist.reduce_scatter_tensor, pairs, self.zero.dp_process_group, op=self.operation)
        self.reducing, self.ready = [(works, self.ready)], []
        self._take_shards(before)
        if self.operation == dist.ReduceOp.SUM:  # gloo's threads are not to work beside the backward pass
            self._take_shards(self.reducing)
            self.reducing = []

    def _take_shards(self, reduced: list[tuple[list, list[nn.Parameter]]]) -> None:
        for works, params in reduced:
            for work in works:
                work.wait()
            self.shards |= {param: self.sums[param][self.rank] for param in params}
        if self.world_size > 1 and self.carrier.waiting:
            for index in range(len(self.layers) // 2, len(self.layers)):
                sums = self.of_layer[self.layers[index]]
                if not sums.num_lent and all(param in self.shards for param in sums.params):
                    self._lend_to_state(sums, index)
            self.carrier.bring()

    def _lend_to_state(self, sums: Sums, index: int) -> None:
        """Moves a layer's shards of this rank to the end of its sums, and lends the rest, which were other ranks'."""
        end = len(sums.memory)
        for param in reversed(sums.params):  # none is moved onto what another one still has to leave
            shard = self.shards[param]
            end -= len(shard)
            self.shards[param] = sums.memory[end : end + len(shard)].copy_(shard.clone())
        sums.lent = self.carrier.lend(sums.memory[:end], needed=1 + index)
        sums.num_lent = sum(buffer.memory.numel() for buffer in sums.lent)

    def _lend_to_activations(self, index: int) -> torch.Tensor:
        """What neither the last update nor state from host memory needs of a layer's sums."""
        sums = self.of_layer[self.layers[index]]
        if sums.updated is not None:
            sums.updated.wait()
        if sums.zeroed is not None:
            sums.zeroed.wait()
        sums.is_used = True
        return sums.memory[sums.num_lent :]

    def open_as_after_an_update(self) -> None:
        """For a dry run: as much of the sums is lent to state as when a step's first micro-batch follows an update."""
        self.opening.is_open = True
        for sums in list(self.of_layer.values())[len(self.layers) // 2 : -LAYERS_BETWEEN]:
            end = len(sums.memory) - sum(p.ds_tensor.numel() for p in sums.params)
            sums.num_lent = host_state.in_chunks(end, self.carrier.words) if self.world_size > 1 else 0

    def _note_updated(self, group: int) -> None:
        for sums in self.last_in[group]:
            sums.updated = None if self.beside is None else torch.cuda.current_stream().record_event()

    @torch.no_grad()
    def _end_backward(self) -> None:
        self.opening.is_open = False
        if not self.zero.is_gradient_accumulation_boundary():
            return
        self.ready += [param for param in self.sums if param in self.unseen]
        self.unseen = set()
        self._reduce_ready()
        self._take_shards(self.reducing)
        self.reducing = []
        if self.world_size > 1 and self.operation == dist.ReduceOp.SUM:
            torch._foreach_div_(list(self.shards.values()), self.world_size)
        by_group = ([self.shards[param] for param in group] for group in self.zero.fp16_groups)
        self.zero.averaged_gradients = dict(enumerate(by_group))

    def _step(self, *arguments, **options) -> None:
        self.take_step(*arguments, **options)
        self.unseen, self.shards, self.opening.is_open = set(self.sums), {}, self.opens
        for layer in self.layers[: -LAYERS_BETWEEN if self.opens else 0]:
            self.of_layer[layer].is_used = True
        in_order = [*self.others, *reversed(self.of_layer.values())]  # as the next backward pass comes to them
        self._zero([sums for sums in in_order if not sums.is_used])

    def _zero(self, all_sums: list[Sums]) -> None:
        """Begins to zero them, once what the current stream and the optimizer's state have in them is done with."""
        if self.beside is not None:
            self.beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.beside):  # none: where it is
            for sums in all_sums:
                for buffer in sums.lent:
                    if buffer.usable is not None:
                        buffer.usable.wait()
                torch._foreach_zero_([sums.memory])
                sums.lent, sums.num_lent, sums.is_used = [], 0, False
                sums.zeroed = None if self.beside is None else self.beside.record_event()

    def _wait_for_zeros(self, layer: nn.Module | None = None, _=None) -> None:
        """Before a layer's backward pass, which adds to its sums; without one: after a forward pass, which matrix
        products fill and which hides it, for the sums outside of layers."""
        if layer is not None and layer is not self.layers[0]:
            below = self.of_layer[self.layers[self.layers.index(layer) - 1]]
            if below.is_used:  # by layers whose backward passes are over
                self._zero([below])
        for sums in self.others if layer is None else [self.of_layer[layer]]:
            if sums.zeroed is not None:
                sums.zeroed.wait()
                sums.zeroed = None


# ------------------------------------------------------------------ parameters
class ResidentParameters:
    """Keeps every parameter of an engine whole on this rank: gathered here and in each of its steps.

    The shards that this rank owns become views of the wholes, into which a step rounds the master weights; once that is
    done for all of a layer, it is gathered. A module that runs waits for its own parameters only; whoever reads them in
    another way calls policy.finish_gathering first.
    """

    def __init__(self, engine, policy: nn.Module, update: Update):
        self.zero, self.world_size, self.stream = engine.optimizer, dist.get_world_size(), update.stream
        offload = self.zero.parameter_offload
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        self.arriving: dict[nn.Module, list] = {}
        group_of = {param: i for i, group in enumerate(self.zero.fp16_groups) for param in group}
        # Of each group the modules whose last parameter is in it, and (whole, shard) of each parameter.
        self.last_in: list[list] = [[] for _ in self.zero.fp16_groups]
        for module, params in _by_module(policy):
            pairs = []
            for param in params:  # the ranks' shards one after another
                whole = param.ds_tensor.data.new_empty(self.world_size, param.ds_tensor.numel())
                param.ds_tensor.data = whole[dist.get_rank()].copy_(param.ds_tensor.data)
                param.data = whole.view(-1)[: param.ds_numel].view(param.ds_shape)
                param.ds_status = ZeroParamStatus.AVAILABLE
                pairs.append((whole.view(-1), param.ds_tensor.data))
            self.last_in[max(group_of[param] for param in params)].append((module, pairs))
            module.register_forward_pre_hook(self._wait)
        policy.finish_gathering = self._wait_for_all
        self.zero._partition_all_parameters = self._wait_for_all
        self.zero._reassign_or_swap_out_partitioned_parameters = self._gather
        self.zero.lp_param_buffer.untyped_storage().resize_(0)
        for group in range(len(self.last_in)):
            self._gather(group)

    @torch.no_grad()
    def _gather(self, group: int) -> None:
        """Starts to gather the modules of which the ranks' shards are now all rounded."""
        for module, pairs in self.last_in[group]:
            if self.world_size > 1:
                self.arriving[module] = _start(dist.all_gather_into_tensor, pairs, self.zero.dp_process_group)
            elif self.stream is not None:
                self.arriving[module] = [torch.cuda.current_stream().record_event()]

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
