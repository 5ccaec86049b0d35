"""Supervised fine-tuning of a causal language model: full parameters, DeepSpeed ZeRO-3, packed.

    deepspeed --num_gpus 8 train_sft.py [--flag value ...]      # --help lists the flags

Reads top to bottom: config and ranks, data, schedule, output folder, memory plan, model and engine, loop, export.
A step takes `global_batch_size` samples over all ranks. Each rank packs its share into micro-batches: each is one
sequence of whole samples laid end to end, and no sample attends to another.
"""

if __name__ == "__main__":  # first, for the other imports take seconds
    from common.interrupts import answer_interrupts

    answer_interrupts()

import gc
import math

import torch

from common.config import SFTConfig, parse_config
from common.data.chat_template import resolve_template
from common.data.report import data_table, preview
from common.model import load
from common.model.attention import resolve_kernel
from common.model.export import export_model, export_settings, stored_layout
from common.model.packed import model_inputs, verify_packed_model
from common.ranks import start
from common.run.agreement import agreed_identity, environment, require_agreement
from common.run.card import base_of
from common.run.evaluate import Evaluation, largest, training_and_held_out
from common.run.forecast import forecast
from common.run.metrics import StepMeter
from common.run.output_dir import claim, finish, open_output_dir, record_of
from common.run.plan_table import tell_plan
from common.step.packing import MicroBatch, one_ahead, pack, plan_step, sft_documents
from common.step.schedule import Schedule
from common.stopping import Stopped, StopRequest, main_with_exit_codes, not_finite
from common.zero import checkpoint, memory
from common.zero.ds_config import deepspeed_config
from common.zero.engine import build_engine, oom_explained, require_finite_weights, set_learning_rate


@main_with_exit_codes
def main() -> None:
    # ------------------------------------------------------------------ config and ranks
    config = parse_config(SFTConfig)
    ds_config = deepspeed_config(config)
    ranks = start(config.collective_timeout_minutes)
    require_agreement(lambda: environment(config, ds_config), ranks)  # of all hosts, before anything is read
    dtype = getattr(torch, config.dtype)

    # ------------------------------------------------------------------ data: rows -> text -> tokens, and their targets
    model_folder = ranks.once_per_node(lambda: load.find_model(config.model_name_or_path, config.model_revision))
    model_config = load.load_config(model_folder)
    tokenizer_folder = ranks.once_per_node(lambda: load.find_tokenizer(config.tokenizer_name_or_path or model_folder))
    tokenizer = load.load_tokenizer(tokenizer_folder)
    template = resolve_template(config.chat_template, tokenizer)
    data, held_out = training_and_held_out("sft", config, template, ranks)  # None if nothing is held out
    longest, num_token_ids = largest(data, held_out)
    load.check_supported(model_config, longest, num_token_ids)
    needs = load.attention_needs(model_config, longest)  # of the attention kernel: windows, soft caps, sinks
    kernel = resolve_kernel(config.attn_implementation, ranks.device.type, dtype, needs)
    ranks.say("\n".join([data_table(data), *load.warnings(template, model_config, longest)]))
    ranks.say(preview(data, 0, tokenizer))

    # ------------------------------------------------------------------ schedule
    schedule = Schedule(config, len(data))  # samples and learning rate of each step; the run ends after last_step
    evaluation = Evaluation(data, held_out, config, schedule, ranks)
    ranks.say("\n".join([f"{ranks.world_size} ranks on {ranks.device.type}, {kernel} attention", *schedule.warnings()]))

    # ------------------------------------------------------------------ output folder
    # `claim` returns None for a finished run; for one that was cut short its state and the checkpoint to resume from;
    # for a new one a state with step == 0 and no checkpoint. It refuses a folder that holds another run.
    models = {"model_name_or_path": model_folder}
    digests = {"dataset_mixer": data.digest, "chat_template": template.digest}
    identity = agreed_identity(config, digests, tokenizer_folder, models, kernel, ranks)
    if (claimed := claim(config, identity, schedule.last_step, ranks)) is None:
        return
    state, resume_from = claimed
    # The small files of the export: what cannot be written is found now. Where its tensors go is added further down.
    export_files = ranks.once(lambda: export_settings(model_config, dtype, template, model_folder))

    # ------------------------------------------------------------------ memory plan
    # Residency: which of gradients and weights a rank keeps whole during a step, beside its shard. A run resumed on as
    # many ranks keeps its micro-batch size and its way to sum gradients, unless a flag or the ds_config says otherwise.
    workload = memory.workload_of(config, data.lengths, data.source_of(int(data.lengths.argmax())), state, ranks)
    # memory_plan: what lives where; planned: tokens, and where the device's peak is known hours, memory, MFU and cost.
    ds_config, memory_plan = memory.choose_residency(ds_config, config, model_config, workload, ranks)
    planned = forecast(memory_plan, workload, schedule, data.lengths, model_config, config, ranks)
    tell_plan(config, memory_plan, workload, schedule, evaluation, planned, ranks)  # refuses too small a disk

    # ------------------------------------------------------------------ model and engine
    ranks.say(f"loading {model_folder}")
    host = memory.reserve_host_memory(memory_plan, ranks)  # for optimizer state that the device does not hold
    policy = load.load_partitioned(model_folder, model_config, dtype, kernel, ds_config, ranks)
    export_files |= ranks.once(lambda: stored_layout(policy.lm))
    engine = build_engine(policy, config, ds_config, host)
    verify_packed_model(engine, kernel, ranks)
    if load.compiles_layers(config.compile_layers, ranks.device.type, model_config):
        policy.compile_layers()
    # From dry runs on made-up samples it also follows how many layers recompute their activations.
    made_up = memory.made_up_conversation
    # Tokens that a micro-batch may hold, and a step's first one, beside which state comes from host memory.
    budget, opening = memory.choose_micro_batch(engine, config, memory_plan, kernel, workload, made_up, ranks)
    state.micro_batch_budget, state.opening_budget = budget, opening
    state.residency, state.world_size = memory_plan.residency, ranks.world_size
    parameters = dict(policy.lm.named_parameters())  # lm: transformers' model
    if resume_from is not None:
        checkpoint.load(engine, parameters, resume_from, state, config.resume, ranks)

    # ------------------------------------------------------------------ loop
    resolved = {"num_steps": schedule.num_steps, "data": data.stats, "kernel": kernel, "base": base_of(model_folder)}
    resolved |= {"evaluation": evaluation.record, "planned": planned}
    record = record_of("SFT", config, identity, state, policy, ranks, **resolved)
    metrics = open_output_dir(config, record, state, ranks)
    writer = checkpoint.Writer(engine, parameters, config, ranks, export_files)
    meter = StepMeter(policy.lm, budget, opening, len(data), ranks)
    stop_request = StopRequest(ranks)

    def inputs_of(micro_batch: MicroBatch) -> dict:
        return model_inputs(micro_batch, kernel, ranks.device, config.router_aux_loss_coef)

    def prepared(step: int) -> tuple[list[int], list[list[int]], list[MicroBatch], dict]:
        """The step's samples; this rank's micro-batches: the samples in each, and packed; the first one's inputs."""
        samples = schedule.samples(step)
        # Every rank gets as many micro-batches as the others: ZeRO-3 gathers weights in each of them, on all ranks.
        positions = plan_step(data.lengths[samples].tolist(), ranks.world_size, budget, opening)[ranks.rank]
        plan = [[samples[i] for i in members] for members in positions]
        micro_batches = [pack([sft_documents(data[i]) for i in members]) for members in plan]
        # On the device a step ahead: a copy beside an update would wait behind all state from host memory.
        torch.cuda.set_stream(ranks.stream)  # this runs in a thread; None on a CPU: nothing is set
        return samples, plan, micro_batches, inputs_of(micro_batches[0])

    gc.collect()
    gc.freeze()  # what lives until the end is not searched for garbage again
    meter.start()
    for step, (samples, plan, micro_batches, first) in one_ahead(prepared, range(state.step, schedule.last_step)):
        if evaluation.says_stop(metrics.eval_losses):
            break
        ranks.step = step + 1  # for what is said of a rank that hangs
        # -------------------------------------------------------------- the recipe's step
        num_targets = int(data.num_targets[samples].sum())  # of the whole step: all ranks, all micro-batches
        learning_rate = schedule.learning_rate(step)
        set_learning_rate(engine, learning_rate)
        losses = torch.zeros(len(plan), dtype=torch.float64, device=ranks.device)
        router_losses = torch.zeros((), dtype=torch.float64, device=ranks.device)
        with oom_explained(f"step {step + 1}", budget, workload.longest) as in_hand:
            for m, micro_batch in enumerate(micro_batches):
                in_hand.tokens = micro_batch.num_tokens  # told if memory runs out
                inputs = first if m == 0 else inputs_of(micro_batch)
                logps, imbalance = engine(**inputs)  # of each target; the routers', summed over sequences
                loss = -logps.sum()
                router_loss = config.router_aux_loss_coef * imbalance / len(samples)  # its share of the step's
                engine.set_gradient_accumulation_boundary(m == len(plan) - 1)
                # DeepSpeed averages gradients over ranks: times world_size, they are summed, as over micro-batches.
                engine.backward(loss * ranks.world_size / num_targets + router_loss * ranks.world_size)
                router_losses += router_loss.detach()
                losses[m] = loss.detach()
        # Over all ranks; the votes: have they written what of a checkpoint is theirs, were they asked to stop.
        sizes = [sum(mb.num_tokens for mb in micro_batches), sum(mb.sum_squared_lengths for mb in micro_batches)]
        sums = ranks.sum([losses.sum().item(), router_losses.item(), *sizes, writer.vote(), *stop_request.votes()])
        nll, router_aux_loss, all_tokens, all_squared_lengths, written, terminate, interrupt = sums
        writer.proceed(written)
        train_loss = nll / num_targets
        if not math.isfinite(train_loss):
            writer.wait()
            raise not_finite(step + 1, "loss", train_loss, plan, losses.tolist(), data.lengths, data, ranks)
        with oom_explained(f"step {step + 1}, update", budget, workload.longest):
            engine.step()
        if not engine.was_step_applied():  # DeepSpeed skips an update whose gradient norm is not finite
            writer.wait()
            raise not_finite(step + 1, "gradient norm", math.nan, plan, None, data.lengths, data, ranks)
        # -------------------------------------------------------------- the step is done

        state.finish_step(len(samples), int(all_tokens), num_targets)
        computed = {"train_loss": train_loss, "learning_rate": learning_rate}
        computed["grad_norm"] = float(engine.get_global_grad_norm())  # before clipping
        computed |= {"router_aux_loss": router_aux_loss} if config.router_aux_loss_coef else {}
        step_record = meter.record(state, computed, int(all_tokens), int(all_squared_lengths), num_targets, len(plan))
        is_evaluated, is_last = evaluation.is_due(state.step), state.step == schedule.last_step
        if is_evaluated or is_last or state.step % config.logging_steps == 0:
            ranks.say(meter.line(step_record, schedule.last_step), is_live=not (is_evaluated or is_last))
            if is_evaluated:
                step_record |= evaluation(engine, kernel, budget)
            metrics.append(step_record)
        is_kept = is_evaluated and evaluation.notes_best(state.step, step_record["eval/loss"])

        stop_signal = stop_request.agreed(terminate, interrupt, ranks)
        if stop_signal or is_kept or schedule.saves(state.step):
            writer.wait()
            require_finite_weights(engine, state.step, ranks)
            metrics.flush_to_disk()
            writer.save(state)
        if stop_signal:
            writer.wait()
            raise Stopped(stop_signal)
        meter.start()

    # ------------------------------------------------------------------ export
    stop_request.finish_export_first()
    writer.wait()
    metrics.flush_to_disk()
    record["exported_step"] = evaluation.load_best(engine, parameters) or state.step
    require_finite_weights(engine, state.step, ranks)
    export_model(policy, config.output_dir, export_files, ranks)
    finish(config, record, state, metrics, data_table(data), ranks)


if __name__ == "__main__":
    main()
