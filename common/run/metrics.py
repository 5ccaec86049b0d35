"""What a run reports: metrics.jsonl, curves.png, model FLOPs utilization."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from common.failures import one_line, print_line, writing
from common.files import replace_file
from common.ranks import Ranks
from common.zero.checkpoint import RunState
from common.zero.memory import memory_gb

# Dense bf16 peak of a device in FLOP/s, from the vendors' datasheets; the first name that matches counts.
PEAK_FLOPS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)

PROFILE_VARIABLE = "PLAINTUNE_PROFILE"


def device_peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this device, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


def flops_per_token(num_matmul_parameters: int, config: PretrainedConfig, length: float) -> float:
    """FLOPs to train one token, recomputation not counted: 6 N + 6 layers hidden length (causal attention).

    N: parameters that multiply (all but an input embedding that is not also the output's).
    length: sum of squared lengths / sum of lengths of the tokens in question.
    Kaplan et al. 2020, section 2.1, with the causal half of the attention term of Chowdhery et al. 2022, appendix B.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 6 * num_matmul_parameters + 6 * config.num_hidden_layers * head_dim * config.num_attention_heads * length


def num_matmul_parameters(lm: nn.Module) -> int:
    """All parameters of a (partitioned) model but an input embedding that is not tied to the output."""
    total = sum(p.ds_numel for p in lm.parameters())
    embedding = lm.get_input_embeddings().weight
    return total if embedding is lm.get_output_embeddings().weight else total - embedding.ds_numel


def step_profiler(device: torch.device) -> torch.profiler.profile | None:
    """torch's profiler over two steps after warm-up, if PLAINTUNE_PROFILE names the file for its table; else None.

    The table goes by operations and kernels, the longest first; its first line says for how much of the two
    steps the device ran a kernel.
    """
    path = os.environ.get(PROFILE_VARIABLE)
    if path is None or os.environ.get("RANK", "0") != "0":
        return None
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]

    def write(profiler: torch.profiler.profile) -> None:
        totals = profiler.key_averages()
        table = totals.table(
            sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=40, max_name_column_width=90
        )
        Path(path).write_text(f"{_busy(profiler)}{table}\n", encoding="utf-8")

    profiler = torch.profiler.profile(
        activities=activities,
        on_trace_ready=write,
        schedule=torch.profiler.schedule(wait=4, warmup=1, active=2, repeat=1),
    )
    profiler.start()
    return profiler


def _busy(profiler: torch.profiler.profile) -> str:
    """The union of the kernels' intervals over the time from the first's start to the last's end."""
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
    )
    if not spans:
        return ""
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return f"a kernel was running for {busy / (reached - spans[0][0]):.1%} of {(reached - spans[0][0]) / 1e6:.3f} s\n"


class StepMeter:
    """The fields of metrics.jsonl that SFT and DPO share, from what one optimizer step did over all ranks."""

    def __init__(self, lm: nn.Module, budget: int, num_samples: int, ranks: Ranks):
        self.num_parameters, self.config = num_matmul_parameters(lm), lm.config
        self.budget, self.num_samples, self.world_size, self.device = (
            budget,
            num_samples,
            ranks.world_size,
            ranks.device,
        )
        self.peak_flops = device_peak_flops(self.device)
        self.profiler = step_profiler(self.device)

    def start(self) -> None:
        """Call when the wait for a step's micro-batches begins."""
        if self.profiler is not None:
            self.profiler.step()
        self.started = time.perf_counter()

    def record(
        self,
        state: RunState,
        train_loss: float,
        learning_rate: float,
        grad_norm: float,
        num_tokens: int,
        squared_lengths: int,
        num_targets: int,
        num_micro_batches: int,
    ) -> dict:
        """num_micro_batches: of each rank. squared_lengths: the sum of squared document lengths of the step."""
        seconds = time.perf_counter() - self.started
        per_device_tps = num_tokens / seconds / self.world_size
        record = {
            "step": state.step,
            "epoch": state.samples / self.num_samples,
            "train_loss": train_loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "total_tokens": state.total_tokens,
            "target_tokens": num_targets,
            "samples": state.samples,
            "step_seconds": seconds,
            "tokens_per_second": num_tokens / seconds,
            "per_device_tps": per_device_tps,
            "max_memory_gb": memory_gb(self.device),
            "micro_batches": num_micro_batches,
            "packing_efficiency": num_tokens / (num_micro_batches * self.world_size * self.budget),
        }
        if compiled := torch._dynamo.utils.counters["stats"]["unique_graphs"]:
            record["compiled_graphs"] = compiled  # since the start: growth after warm-up is lost time
        if self.peak_flops:
            flops = flops_per_token(self.num_parameters, self.config, squared_lengths / num_tokens)
            record["mfu"] = per_device_tps * flops / self.peak_flops
        return record


def progress_line(record: dict, last_step: int) -> str:
    """One line for a person."""
    reward = (
        f"  accuracy {record['rewards/accuracy']:.3f}  margin {record['rewards/margin']:.4f}"
        if "rewards/accuracy" in record
        else ""
    )
    mfu = f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
    return (
        f"step {record['step']}/{last_step}  loss {record['train_loss']:.4f}{reward}  grad_norm {record['grad_norm']:.3f}  "
        f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s{mfu}"
    )


class MetricsFile:
    """metrics.jsonl: one JSON object a logged step. Every rank holds one; rank 0's writes."""

    def __init__(self, output_dir: str, resume_step: int, resume_from: Path | None, ranks: Ranks):
        """Keeps the lines of steps up to resume_step, so that a resumed run leaves neither gap nor double: those
        beside the checkpoint that it goes on from, else its folder's own. Collective."""
        self.path, self.step, self.ranks = Path(output_dir) / "metrics.jsonl", resume_step, ranks
        self.history = resume_from.resolve().parent.parent / "metrics.jsonl" if resume_from else self.path
        self.last = None  # the newest record
        self.error: OSError | None = None  # the one that kept a record from being written
        write_once(self._open, self.path, self.step, ranks)

    def _open(self) -> None:
        histories = (
            [line for line, record in _lines(path) if record["step"] <= self.step] for path in (self.history, self.path)
        )
        kept = next(filter(None, histories), [])
        replace_file(self.path, "".join(kept))
        self.file = open(self.path, "a", encoding="utf-8")
        self.last = json.loads(kept[-1]) if kept else None

    def append(self, record: dict) -> None:
        """An error is remembered, for the ranks to vote on at the next step: the others know nothing of it yet."""
        self.last, self.step = record, record["step"]
        if self.ranks.is_main:
            try:
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
            except OSError as e:
                self.error = e

    def sync(self) -> None:
        """On disk before the checkpoint that continues from here. Collective.

        Raises TrainingStopped, on every rank, if a record could not be written: no checkpoint stands after a gap.
        """
        write_once(self._sync, self.path, self.step, self.ranks)

    def _sync(self) -> None:
        if self.error is not None:
            raise self.error
        os.fsync(self.file.fileno())


def write_once(work: Callable[[], None], path: Path | str, step: int, ranks: Ranks) -> None:
    """Runs `work`, which writes to `path` after `step`, on rank 0. Its OSError is TrainingStopped, on every rank."""
    ranks.once(writing(f"{path} could not be written after step {step}", "checkpoints are intact")(work))


def _lines(path: Path):
    """(line, record) of each whole line; a last line torn by a crash is not whole, and what is no record is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record
        elif line.endswith("\n"):
            print_line(f"warning: {path}: left out a line that is not a record: {line[:40]!r}")


def draw_curves(output_dir: str) -> None:
    """curves.png from metrics.jsonl: loss, gradient norm, learning rate, speed, and the rewards of DPO."""
    try:
        _draw_curves(output_dir)
    except Exception as e:  # a picture is not worth a run that is done
        print_line(f"warning: {output_dir}/curves.png was not drawn: {type(e).__name__}: {one_line(e)}")


def _draw_curves(output_dir: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for _, record in _lines(Path(output_dir) / "metrics.jsonl")]
    if not records:
        return
    panels = [["train_loss"], ["grad_norm"], ["learning_rate"], ["tokens_per_second"]]
    if "rewards/accuracy" in records[0]:
        panels[2:] = [
            ["rewards/accuracy"],
            ["rewards/chosen", "rewards/rejected", "rewards/margin"],
            ["logps/chosen", "logps/rejected"],
            ["learning_rate"],
        ]
    rows = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.2 * rows), layout="constrained")
    steps = [record["step"] for record in records]
    for axis, names in zip(axes.flat, panels, strict=True):
        for name in names:
            axis.plot(steps, [record.get(name, math.nan) for record in records], label=name, linewidth=1)
        axis.set_title(", ".join(names), fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.savefig(Path(output_dir) / "curves.png.tmp", format="png", dpi=110)
    pyplot.close(figure)
    os.replace(Path(output_dir) / "curves.png.tmp", Path(output_dir) / "curves.png")
