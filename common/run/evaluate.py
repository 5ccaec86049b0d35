"""Held-out evaluation: what is held out, when it is evaluated, its numbers, and whether a run stops for them.

Evaluation packs and runs as training does, without gradients. A loss is a sum over tokens (SFT) or pairs (DPO) divided
by their number: of each source, and of all together.
"""

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import DPOConfig, TrainConfig
from common.data.cache import prepare_tokens
from common.data.chat_template import ChatTemplate
from common.data.dataset import TokenDataset
from common.data.sources import check_amount, subset_indices
from common.data.tokens import PreferencePair
from common.failures import UserError, as_user_error
from common.files import digest
from common.ranks import Ranks
from common.run.reference import compute_logps, reference_pass
from common.step.losses import SUMMED, preference_loss_and_sums
from common.step.schedule import Schedule
from common.zero import checkpoint
from common.zero.memory import memory_gb

EVALUATIONS = 10  # in a run, unless --eval_steps says otherwise


def training_and_held_out(
    kind: str, config: TrainConfig, template: ChatTemplate, ranks: Ranks, most_rows: int | None = None
) -> tuple:
    """(the run's TokenDataset, that of its evaluation or None). kind: "sft" or "dpo"; most_rows: as in prepare_tokens.
    Collective. Raises UserError for data that cannot be used."""

    def read(mixer: list[str]) -> TokenDataset:
        of_mixer = dataclasses.replace(config, dataset_mixer=mixer)
        return TokenDataset(ranks.once_per_node(lambda: prepare_tokens(kind, of_mixer, template, most_rows)))

    data, held_out = read(config.dataset_mixer), None
    if config.eval_holdout:
        return split(data, config.eval_holdout)
    if config.eval_dataset_mixer:
        held_out = read(config.eval_dataset_mixer)
        if len({*ranks.gather(lambda: held_out.digest)}) > 1:  # ranks with other plans would wait for one another
            raise UserError("--eval_dataset_mixer: its rows are not the same on all hosts")
    return data, held_out


def split(data: TokenDataset, amount: str) -> tuple[TokenDataset, TokenDataset]:
    """(the rest, what is held out), in the data's order. amount: "1%" or "200" of the rows that were kept, drawn as a
    source's subset is, whatever the seed; each with all copies that its source takes. Raises UserError."""
    rows, row_of = np.unique(data.rows, axis=0, return_inverse=True)
    with as_user_error(f"--eval_holdout {amount}", ValueError):
        check_amount(amount)
        drawn = subset_indices(len(rows), amount)
        if len({*drawn.tolist()}) == len(rows):
            raise ValueError("nothing would be left to train on")
    is_held_out = np.isin(row_of.ravel(), drawn)
    return data.select(np.flatnonzero(~is_held_out)), data.select(np.flatnonzero(is_held_out))


def largest(*parts: TokenDataset | None) -> tuple[int, int]:
    """(tokens of the longest sequence, the largest token id + 1), over all parts: what the model must take."""
    data = [part for part in parts if part is not None]
    return max(d.longest_side() for d in data), max(d.stats["largest_token_id"] for d in data) + 1


def source_names(data: TokenDataset) -> list[str]:
    """A short name of each source, as a part of a metric's: the file's without its ending, or the data set's."""
    names: list[str] = []
    for source in data.stats["sources"]:
        name = Path(source["path"]).name
        name = re.sub(r"[^\w.-]+", "_", name.split(".")[0] if "sha256" in source else name)
        taken = sum(other.split("~")[0] == name for other in names)
        names.append(f"{name}~{taken + 1}" if taken else name)
    return names


class Evaluation:
    """The evaluations of one run; without held-out data none is ever due. record: for run_config.json."""

    def __init__(
        self, data: TokenDataset, held_out: TokenDataset | None, config: TrainConfig, schedule: Schedule, ranks: Ranks
    ):
        """Counts the held-out samples that are trained on, too, and says what will be evaluated. Collective."""
        self.held_out: Any = held_out
        self.config, self.ranks, self.last_step = config, ranks, schedule.last_step
        self.every, self.record = config.eval_steps or math.ceil(schedule.num_steps / EVALUATIONS), None
        if held_out is None:
            return
        self.parts = {"eval": np.arange(len(held_out))}
        for i, name in enumerate(source_names(held_out)):
            if len(part := np.flatnonzero(held_out.source == i)):
                self.parts[f"eval/{name}"] = part
        self.reference_logps: np.ndarray = np.zeros((len(held_out), 2), np.float32)
        num_shared = ranks.once(lambda: num_also_in(held_out, data))
        sizes = {name: len(part) for name, part in self.parts.items()}
        self.record = {"every": self.every, "samples": sizes, "also_trained": num_shared, "held_out": held_out.digest}
        if config.eval_holdout:
            self.record["rows"] = [held_out.source_of(i) for i in range(len(held_out))]
        of_each = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        ranks.say(f"evaluation every {self.every} steps and at the end; samples: {of_each}")
        ranks.say(f"{'warning: ' * (num_shared > 0)}{num_shared:,} of these samples are also among those trained on")

    def read_reference(self, engine, weights: str, kernel: str, budget: int) -> None:
        """Log-probabilities of the held-out pairs under the reference, as reference_pass. Collective."""
        if self.record is not None and isinstance(self.config, DPOConfig):
            data, needed = self.held_out, [*range(len(self.held_out))]
            passed = reference_pass(engine, data, needed, weights, self.config, kernel, budget, self.ranks)
            self.reference_logps, self.record = passed[0], self.record | passed[1]

    def is_due(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps."""
        return self.held_out is not None and (step % self.every == 0 or step == self.last_step)

    def __call__(self, engine, kernel: str, budget: int) -> dict[str, float]:
        """The metrics of the engine's present weights, the same bits on every rank. Collective.

        SFT: loss, nats a target token, and perplexity, its exponential. DPO: loss, accuracy and margin, as in training.
        """
        started, everything = time.perf_counter(), [*range(len(self.held_out))]
        metrics: dict[str, float] = {}
        self.ranks.say(f"evaluating {len(everything):,} samples")
        logps = compute_logps(engine, self.held_out, everything, self.config, kernel, budget, self.ranks, "evaluation")
        for name, members in self.parts.items():
            means = self._means(logps[members], members)
            metrics |= {f"{name}/{key}": value for key, value in means.items()}
            if name == "eval" or len(self.parts) > 2:  # a single source is all
                self.ranks.say("  ".join([f"  {name}", *(f"{key} {value:.4f}" for key, value in means.items())]))
        peak = memory_gb(self.ranks.device)  # from here on the peak is training's again
        self.ranks.say(f"  evaluated in {time.perf_counter() - started:.1f} s, {peak:.1f} GB at most")
        return metrics

    def _means(self, logps: np.ndarray, members: np.ndarray) -> dict[str, float]:
        if not isinstance(self.config, DPOConfig):
            loss = -logps.sum(dtype=np.float64) / self.held_out.num_targets[members].sum()
            return {"loss": float(loss), "perplexity": float(np.exp(loss))}
        pairs = [pair for pair in map(self.held_out.__getitem__, members) if isinstance(pair, PreferencePair)]
        num_scored = [[len(p.chosen_ids) - p.chosen_start, len(p.rejected_ids) - p.rejected_start] for p in pairs]
        tensors = (torch.from_numpy(logps), torch.from_numpy(self.reference_logps[members]), torch.tensor(num_scored))
        _, sums = preference_loss_and_sums(*tensors, self.config)
        means = dict(zip(SUMMED, (sums / len(members)).tolist(), strict=True))
        return {"loss": means["train_loss"]} | {name: means[f"rewards/{name}"] for name in ("accuracy", "margin")}

    def notes_best(self, step: int, loss: float) -> bool:
        """Whether --keep_best keeps the checkpoint of `step`, after which `loss` was found. Collective. What it has to
        better is the kept one's: a lower loss may be of other held-out data, or of a checkpoint that is gone."""
        entry = {"step": step, "loss": loss, "held_out": self.held_out and self.held_out.digest}

        def keep() -> bool:
            kept = checkpoint.kept(self.config.output_dir)
            is_best = loss < (kept["loss"] if kept.get("held_out") == entry["held_out"] else math.inf)
            if is_best:
                checkpoint.keep(self.config.output_dir, entry)
            return is_best

        return self.config.keep_best is not None and self.ranks.once(keep)

    def load_best(self, engine, parameters: checkpoint.Parameters) -> int | None:
        """With --export_best puts the kept checkpoint's weights into the engine; its step, else None. Collective."""
        step = self.ranks.once(lambda: checkpoint.kept(self.config.output_dir).get("step"))
        if not self.config.export_best or step is None:
            return None
        path, what = checkpoint.path_of(self.config.output_dir, step), "--export_best: the model is that"
        checkpoint.load(engine, parameters, path, checkpoint.read_state(path), str(path), self.ranks, what)
        return step

    def says_stop(self, losses: list[float]) -> bool:
        """Whether --early_stopping_patience ends the run here; says so. losses: `eval/loss` so far, of this data."""
        patience = self.config.early_stopping_patience
        if stops := has_stalled(losses, patience):
            since = f"the last {patience} evaluations did not better eval/loss {min(losses):.4f}"
            self.ranks.say(f"early stopping: {since}")
        return stops


def has_stalled(losses: list[float], patience: int | None) -> bool:
    """Whether the last `patience` losses, or more, have not bettered the lowest one before them. None: never."""
    best, since = math.inf, 0
    for loss in losses:  # one that is not a number betters nothing
        best, since = (loss, 0) if loss < best else (best, since + 1)
    return patience is not None and since >= patience


def num_also_in(held_out: TokenDataset, data: TokenDataset) -> int:
    """How many samples of held_out have exactly the tokens of a sample of data."""
    trained = {digest(data.tokens_of(i).tobytes()) for i in range(len(data))}
    return sum(digest(held_out.tokens_of(i).tobytes()) in trained for i in range(len(held_out)))
