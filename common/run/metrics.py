"""What a run reports: metrics.jsonl, a line a step, model FLOPs utilization."""

import errno
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from common.failures import UserError
from common.files import naming, replace_file
from common.model.experts import part_met
from common.ranks import Ranks
from common.run.curves import read_metrics
from common.run.trackers import Trackers
from common.zero.checkpoint import RunState
from common.zero.memory import memory_gb

# Dense bf16 peak of a device in TFLOP/s, from the vendors' datasheets; the first name that is part of its name counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "B200": 2250, "A100": 312, "A800": 312}
PEAK_TFLOPS |= {"L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71}

SHOWN = {"train_loss": "loss {:.4f}", "rewards/accuracy": "accuracy {:.3f}", "rewards/margin": "margin {:.4f}"}
SHOWN |= {"grad_norm": "grad_norm {:.3f}", "tokens_per_second": "{:,.0f} tokens/s", "mfu": "mfu {:.1%}"}
SHOWN |= {"max_memory_gb": "{:.1f} GB", "learning_rate": "lr {:.2e}", "epoch": "epoch {:.2f}"}  # of a step, in a line


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device, None where it is not known."""
    return peak_flops_of(torch.cuda.get_device_name(device) if device.type == "cuda" else "")


def peak_flops_of(name: str) -> float | None:
    """As device_peak_flops, by a device's name."""
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def flops_per_token(num_parameters: int, config: PretrainedConfig, length: float) -> float:
    """FLOPs to train one token, recomputation not counted: 6 N + 6 layers hidden length (causal attention).

    num_parameters: N, those that multiply it (all but an input embedding that is not also the output's, and experts
    that it is not routed to). length: sum of squared lengths / sum of lengths of the tokens in question; in a layer
    with a window at most two windows, for on average a token sees half of it; 0 in one without attention.
    Kaplan et al. 2020, section 2.1, with the causal half of the attention term of Chowdhery et al. 2022, appendix B.
    """
    heads = getattr(config, "num_attention_heads", None) or 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = (getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)) or length
    seen = {"sliding_attention": min(length, 2 * window), "linear_attention": 0, "conv": 0, "moe": 0, "mlp": 0}
    return 6 * num_parameters + 6 * head_dim * heads * sum(seen.get(kind, length) for kind in types)


class StepMeter:
    """The fields of metrics.jsonl that SFT and DPO share."""

    def __init__(self, lm: nn.Module, budget: int, opening: int, num_samples: int, ranks: Ranks):
        config = lm.config.get_text_config()
        embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        counted = ((name, p) for name, p in lm.named_parameters() if p is not embedding or p is head)
        self.num_parameters = round(sum(p.ds_numel * part_met(config, name) for name, p in counted))
        self.config, self.budget, self.num_samples, self.ranks = config, budget, num_samples, ranks
        self.opening = opening
        self.peak_flops = device_peak_flops(ranks.device)
        self.began = time.monotonic()
        self.paced_from: tuple[int, float] | None = None

    def line(self, record: dict, last_step: int) -> str:
        """A step for a person; narrow terminals show its beginning. The time left is that of the steps to come at this
        process's pace so far, without the first one, which also compiles, and with what comes between steps."""
        step, now = record["step"], time.monotonic()
        since, began = self.paced_from = self.paced_from or (step, now)
        left = timedelta(seconds=round((now - began) / max(1, step - since) * (last_step - step)))
        parts = [f"step {step}/{last_step}"] + [f"left {left}"] * (step > since)
        parts += [form.format(record[name]) for name, form in SHOWN.items() if name in record]
        return "  ".join([*parts, f"elapsed {timedelta(seconds=round(now - self.began))}"])

    def start(self) -> None:
        """Called when the wait for a step's micro-batches begins."""
        self.started = time.perf_counter()

    def record(self, state: RunState, computed: dict, tokens: int, squares: int, targets: int, rows: int) -> dict:
        """The step that is done. computed: its losses and the like, by their names in metrics.jsonl. Over all ranks:
        its tokens, the sum of its samples' squared lengths, its target tokens. rows: micro-batches of each rank."""
        seconds, world_size = time.perf_counter() - self.started, self.ranks.world_size
        record = {
            "step": state.step,
            "epoch": state.samples / self.num_samples,
            **computed,
            "total_tokens": state.total_tokens,
            "target_tokens": targets,
            "samples": state.samples,
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "per_device_tps": tokens / seconds / world_size,
            "max_memory_gb": memory_gb(self.ranks.device),
            "micro_batches": rows,
            "packing_efficiency": tokens / (world_size * (self.opening + (rows - 1) * self.budget)),
        }
        if compiled := torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            record["compiled_graphs"] = compiled  # since the start: growth after warm-up is lost time
        if self.peak_flops:
            flops = flops_per_token(self.num_parameters, self.config, squares / tokens)
            record["mfu"] = record["per_device_tps"] * flops / self.peak_flops
        return record


class MetricsFile:
    """metrics.jsonl: one JSON object a logged step. Every rank holds one; rank 0's writes."""

    def __init__(self, output_dir: str, state: RunState, ranks: Ranks, trackers: Trackers | None = None):
        """Keeps the records up to `state.step`, so that a resumed run leaves neither gap nor double; state.num_records
        is from here on their number. Collective. Raises UserError where some are missing; that all are is said.
        `eval_losses` begin after the step state.held_out_since."""
        self.path, self.state, self.ranks, self.trackers = Path(output_dir) / "metrics.jsonl", state, ranks, trackers

        def keep() -> tuple[dict | None, int, list[float]]:
            is_there = self.path.is_file()
            kept = [record for record in read_metrics(self.path) if record["step"] <= state.step]
            if (num_lost := state.num_records - len(kept)) > 0:
                lost = f"{self.path}: {num_lost} of its {state.num_records} records up to step {state.step} are missing"
                if is_there:
                    raise UserError(f"{lost}; put them back, or move the file away to go on without those before")
                ranks.say(f"warning: {lost}: the run goes on without")
            replace_file(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self.file = open(self.path, "a", encoding="utf-8")
            evaluated = [record for record in kept if "eval/loss" in record and record["step"] > state.held_out_since]
            return kept[-1] if kept else None, len(kept), [record["eval/loss"] for record in evaluated]

        self.last, state.num_records, self.eval_losses = ranks.once(keep)  # last: the newest record

    def append(self, record: dict) -> None:
        """Collective: where rank 0 cannot write, every rank raises its OSError, before the next update."""
        self.last = record
        self.state.num_records += 1
        self.eval_losses += [record["eval/loss"]] if "eval/loss" in record else []
        self.ranks.gather(lambda: self._write(json.dumps(record) + "\n") if self.ranks.is_main else None)
        if self.trackers is not None:
            self.trackers.log(record)

    def flush_to_disk(self) -> None:
        """On disk before the checkpoint that continues from here. Collective."""

        def flush() -> None:
            self._write("")
            with naming(self.path):
                os.fsync(self.file.fileno())

        self.ranks.once(flush)

    def _write(self, text: str) -> None:
        """Raises an OSError where output_dir was deleted or renamed: an open file takes writes that are lost then."""
        with naming(self.path):
            self.file.write(text)
            self.file.flush()
        if not os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
            raise OSError(errno.ESTALE, "it was replaced during the run", str(self.path))
