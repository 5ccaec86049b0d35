"""Direct preference optimization of a causal language model: full parameters, DeepSpeed ZeRO-3, packed.

    deepspeed --num_gpus 8 train_dpo.py [--flag value ...]      # --help lists the flags

Reads top to bottom: config, process group, data, plan, model, engine, reference, resume, loop, export.
"""

import gc
import math
import sys

import numpy as np
import torch

from common.config import DPOConfig, parse_config
from common.data.cache import tokenized_data
from common.data.chat_template import resolve_template
from common.data.report import data_table, preview
from common.failures import not_finite
from common.model import export, packed
from common.model import load as model
from common.model.attention import resolve_kernel, to_device
from common.model.logprobs import sequence_logps
from common.ranks import start
from common.run import output_dir as run_record
from common.run.metrics import MetricsFile, StepMeter, draw_curves, progress_line, write_once
from common.run.reference import reference_logps
from common.step.losses import SUMMED, check_first_step, preference_loss, preference_sums
from common.step.packing import MicroBatch, one_ahead, pack, packing_report, pair_documents, pair_length, plan_step
from common.step.schedule import (
    checkpoint_interval,
    learning_rate_schedule,
    samples_seen,
    step_samples,
    steps_per_epoch,
    total_steps,
)
from common.stopping import Stopped, StopRequest, main_with_exit_codes
from common.zero import checkpoint
from common.zero.ds_config import deepspeed_config
from common.zero.engine import (
    build_engine,
    inference_engine,
    out_of_memory_explained,
    require_finite_weights,
    set_learning_rate,
)
from common.zero.memory import choose_micro_batch, choose_residency, workload_of


@main_with_exit_codes
def main() -> None:
    # ------------------------------------------------------------------ config and process group
    config = parse_config(DPOConfig)
    preference = preference_loss(config)
    ds_config = deepspeed_config(config)
    ranks = start(config.collective_timeout_minutes)
    dtype = getattr(torch, config.dtype)
    kernel = resolve_kernel(config.attn_implementation, ranks.device.type, dtype)

    # ------------------------------------------------------------------ tokenizer, template, data
    model_folder = ranks.once_per_node(lambda: model.find_model(config.model_name_or_path, config.model_revision))
    model_config = model.load_config(model_folder)
    reference_folder = None
    if config.ref_model_name_or_path is not None:
        reference_folder = ranks.once_per_node(lambda: model.find_model(config.ref_model_name_or_path))
        reference_config = model.load_config(reference_folder)
    tokenizer_folder = ranks.once_per_node(lambda: model.find_tokenizer(config.tokenizer_name_or_path or model_folder))
    tokenizer = model.load_tokenizer(tokenizer_folder)
    template = resolve_template(config.chat_template, tokenizer)
    data = tokenized_data("dpo", config, tokenizer, tokenizer_folder, template, ranks)
    pair_lengths = pair_length(*data.pair_lengths.T, config.share_prompt)  # tokens of each in a micro-batch
    longest_side = int((data.pair_lengths[:, 0] + data.pair_lengths[:, 1:].max(1)).max())
    model.check_supported(model_config, config.max_seq_length, longest_side, model.num_token_ids(tokenizer))
    if reference_folder is not None:
        model.check_supported(reference_config, config.max_seq_length, longest_side, model.num_token_ids(tokenizer))
        model.check_same_vocabulary(model_config, reference_config)
    ranks.say(data_table(data))
    ranks.say(preview(data, 0, tokenizer, colour=sys.stdout.isatty()))

    # ------------------------------------------------------------------ plan
    num_steps = total_steps(len(data), config.global_batch_size, config.num_train_epochs, config.max_train_steps)
    last_step = min(num_steps, config.stop_after_steps or num_steps)
    learning_rate = learning_rate_schedule(
        config.lr_scheduler_type, config.learning_rate, num_steps, config.warmup_ratio
    )
    save_every = checkpoint_interval(config.checkpointing_steps, len(data), config.global_batch_size)
    identity = ranks.once(
        lambda: run_record.run_identity(config, data.digest, template.digest, model_folder, reference_folder)
    )
    if ranks.once(lambda: run_record.check_output_dir(config, identity, last_step)):
        ranks.say(f"{config.output_dir} holds this run, finished after {last_step} steps; nothing to do")
        return
    state, resume_from = checkpoint.starting_point(config.output_dir, config.resume, identity, last_step, ranks)
    workload = workload_of(config, pair_lengths, longest_side, data.source_of(int(pair_lengths.argmax())), state, ranks)
    ranks.say(
        f"DPO ({config.loss_type}): {len(data):,} pairs; {last_step:,} of {num_steps:,} steps of "
        f"{config.global_batch_size} pairs; {ranks.world_size} ranks on {ranks.device.type}; {kernel} attention; "
        f"a checkpoint every {save_every} steps"
    )
    if config.share_prompt:
        whole = pair_length(*data.pair_lengths.T, share_prompt=False)
        ranks.say(f"shared prompts: {pair_lengths.sum():,} tokens an epoch in place of {whole.sum():,}")
    if save_every > last_step:
        ranks.say(
            f"warning: --checkpointing_steps {save_every} is more than this run's {last_step} steps: "
            f"no checkpoint will be written, and a crash loses everything"
        )

    # ------------------------------------------------------------------ reference, if it is a model of its own
    epoch = range(
        min(last_step, steps_per_epoch(len(data), config.global_batch_size))
    )  # later epochs take the same pairs
    pairs = sorted({i for s in epoch for i in step_samples(s, len(data), config.global_batch_size, config.seed)})
    ds_config, placement = choose_residency(ds_config, config, model_config, workload, ranks)
    reference = cached_in = None
    if reference_folder is not None:  # another model than the policy: it is gone before the policy loads
        other = model.load_partitioned(reference_folder, reference_config, dtype, kernel, ds_config, ranks)
        with inference_engine(other, ds_config) as engine:
            reference, cached_in = reference_logps(
                engine, data, pairs, reference_folder, config, kernel, workload.budget, ranks
            )
        del other, engine

    # ------------------------------------------------------------------ model and engine
    policy = model.load_partitioned(model_folder, model_config, dtype, kernel, ds_config, ranks)
    engine = build_engine(policy, config, ds_config)
    packed.verify_packed_forward(engine, kernel, ranks)
    if config.compile_layers is True or (config.compile_layers == "auto" and ranks.device.type == "cuda"):
        policy.compile_layers()
    budget = choose_micro_batch(engine, config, ds_config, kernel, workload, ranks)
    state.micro_batch_budget, state.gradients, state.world_size = budget, placement.gradients, ranks.world_size
    first = (step_samples(step, len(data), config.global_batch_size, config.seed) for step in range(min(last_step, 20)))
    ranks.say(packing_report((pair_lengths[samples].tolist() for samples in first), ranks.world_size, budget))
    parameters = dict(policy.lm.named_parameters())
    if preference.needs_reference and reference is None:  # the policy, which still is the starting model
        reference, cached_in = reference_logps(engine, data, pairs, model_folder, config, kernel, budget, ranks)

    # ------------------------------------------------------------------ resume
    if resume_from is not None:
        checkpoint.load(engine, parameters, resume_from, state.step, ranks)
        ranks.say(f"resuming after step {state.step} from {resume_from}")
    run = {
        "method": "DPO",
        "config": vars(config),
        "identity": identity,
        "num_steps": num_steps,
        "kernel": kernel,
        "micro_batch_budget": budget,
        "placement": placement._asdict(),
        "layers": policy.layers_report(),
        "reference_cache": cached_in,
        "data": data.stats,
        "zero": model.partition_report(parameters, ranks),
        **run_record.environment(ranks),
    }
    num_checkpoints = min(config.keep_last_n_checkpoints + 1, last_step // save_every)
    ranks.once(lambda: checkpoint.require_disk_space(parameters, config.output_dir, num_checkpoints))
    ranks.once(lambda: run_record.open_output_dir(config, run, resume_from, state.step))
    metrics = MetricsFile(config.output_dir, state.step, resume_from, ranks)
    meter = StepMeter(policy.lm, budget, len(data), ranks)
    stop_request = StopRequest(ranks)

    # ------------------------------------------------------------------ loop
    def prepared(step: int) -> tuple[list[int], list[list[int]], list[MicroBatch]]:
        """The step's samples, and this rank's micro-batches: the samples in each, and packed."""
        samples = step_samples(step, len(data), config.global_batch_size, config.seed)
        plan = plan_step(pair_lengths[samples].tolist(), ranks.world_size, budget)[ranks.rank]
        plan = [[samples[i] for i in members] for members in plan]
        return (
            samples,
            plan,
            [pack([pair_documents(data[i], config.share_prompt) for i in members]) for members in plan],
        )

    gc.collect()
    gc.freeze()  # what lives until the end is not searched for garbage again
    meter.start()
    for step, (samples, plan, micro_batches) in one_ahead(prepared, range(state.step, last_step)):
        num_targets = int(data.num_targets[samples].sum())
        set_learning_rate(engine, learning_rate(step))

        losses = torch.zeros(len(plan), dtype=torch.float64, device=ranks.device)
        sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=ranks.device)
        num_tokens = squared_lengths = 0
        with out_of_memory_explained(f"step {step + 1}", budget, workload.longest) as size:
            for m, (members, micro_batch) in enumerate(zip(plan, micro_batches, strict=True)):
                size.tokens = micro_batch.num_tokens
                token_logps = engine(**packed.model_inputs(micro_batch, kernel, ranks.device))
                logps = sequence_logps(token_logps, micro_batch.sequence_targets).view(-1, 2)  # (chosen, rejected)
                ratios = logps if reference is None else logps - to_device(reference[members], ranks.device)
                if preference.averages_over_length:
                    lengths = to_device(np.reshape(micro_batch.sequence_targets, (len(members), 2)), ranks.device)
                    logps, ratios = logps / lengths, ratios / lengths
                loss = preference.function(ratios[:, 0], ratios[:, 1], config).sum()
                engine.set_gradient_accumulation_boundary(m == len(plan) - 1)
                engine.backward(loss * ranks.world_size / len(samples))  # DeepSpeed averages gradients over ranks
                losses[m] = loss.detach()
                sums += preference_sums(loss, ratios, logps, config)
                num_tokens += micro_batch.num_tokens
                squared_lengths += micro_batch.sum_squared_lengths

        *sums, num_tokens, squared_lengths, unwritten, terminate, interrupt = ranks.sum(
            [*sums.tolist(), num_tokens, squared_lengths, metrics.error is not None, *stop_request.votes()]
        )
        if unwritten:
            metrics.sync()  # raises, on every rank
        means = {name: value / len(samples) for name, value in zip(SUMMED, sums, strict=True)}
        train_loss = means.pop("train_loss")
        if not math.isfinite(train_loss):
            raise not_finite(step + 1, "loss", train_loss, plan, losses.tolist(), pair_lengths, data, ranks)
        if step == 0 and reference_folder is None:
            check_first_step(train_loss, means, preference, config)
        with out_of_memory_explained(f"step {step + 1}, update", budget, workload.longest):
            engine.step()
        if not engine.was_step_applied():
            raise not_finite(step + 1, "gradient norm", math.nan, plan, None, pair_lengths, data, ranks)

        state.step = step + 1
        state.samples = samples_seen(state.step, len(data), config.global_batch_size)
        state.total_tokens += int(num_tokens)
        state.target_tokens += num_targets
        grad_norm = float(engine.get_global_grad_norm())  # before clipping
        record = meter.record(
            state, train_loss, learning_rate(step), grad_norm, num_tokens, squared_lengths, num_targets, len(plan)
        )
        record |= means
        if state.step % config.logging_steps == 0 or state.step == last_step:
            metrics.append(record)
            ranks.say(progress_line(record, last_step))

        stop_signal = stop_request.agreed(terminate, interrupt, ranks)
        if stop_signal or state.step % save_every == 0:
            require_finite_weights(engine, state.step, ranks)
            metrics.sync()
            path = checkpoint.save(parameters, state, config.output_dir, config.keep_last_n_checkpoints, ranks)
            ranks.say(f"checkpoint {path}")
        if stop_signal:
            raise Stopped(stop_signal)
        meter.start()

    # ------------------------------------------------------------------ export
    stop_request.wait_for_export()
    metrics.sync()  # the last record is written, or the run stops
    require_finite_weights(engine, state.step, ranks)
    export.export_model(policy, config.output_dir, template, model_folder, ranks)
    agreement = ranks.gather(lambda: [state.step, state.total_tokens])
    ranks.once(lambda: draw_curves(config.output_dir))
    write_once(
        lambda: run_record.finish(config, run, state, metrics.last, agreement, data_table(data)),
        config.output_dir,
        state.step,
        ranks,
    )
    ranks.say(f"done: {config.output_dir} holds the model after {state.step} steps")


if __name__ == "__main__":
    main()
