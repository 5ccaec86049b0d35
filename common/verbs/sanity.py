"""Sanity, end to end: does this machine, with this code, train?

    bash run.sh sanity                        # the embedded default: SFT, DPO, talk to both, judge
    bash run.sh sanity sft|dpo [N] [flags]    # 100 steps of the real recipe on N GPUs, judged; flags of train_sft|dpo.py

Writes to output/sanity; the recipe to output/sanity-sft or -dpo, which it wipes first. Trains through
`bash run.sh sft|dpo`, the way a user does. Exits 0 only if every check passes, 1 if one fails, 2 on a mistake in the
command, 143 or 130 when stopped.
"""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from common.failures import UserError, print_line
from common.verbs.judge import Check, Score, format_table, judge_answers, judge_run
from common.verbs.sanity_data import Question, read_answer, read_held_out, write_data, write_model

RUN_SH = Path(__file__).resolve().parents[2] / "run.sh"
SEED = 42
OUTPUT = Path("output/sanity")
NUM_SFT, NUM_PREFERENCES, NUM_HELD_OUT = 6000, 1920, 400
BOTH = {
    "global_batch_size": 64,
    "max_seq_length": 64,
    "seed": SEED,
    "cache_dir": OUTPUT / "cache",
    "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
}
SFT = {
    "model_name_or_path": OUTPUT / "model",
    "dataset_mixer": OUTPUT / "data/sft.jsonl",
    "learning_rate": 2e-3,
    "num_train_epochs": 4,
    "checkpointing_steps": 200,
    "output_dir": OUTPUT / "sft",
}
DPO = {
    "model_name_or_path": OUTPUT / "sft",
    "dataset_mixer": OUTPUT / "data/preferences.jsonl",
    "learning_rate": 3.5e-5,
    "loss_type": "dpo_norm",
    "beta": 5.0,
    "checkpointing_steps": 20,
    "output_dir": OUTPUT / "dpo",
}
SLOW_STEP_FLOOR = 5.0  # seconds; a tiny model's steps take a tenth of one, and any hiccup ten of those
RECIPE_SLOW_STEP_FLOOR = 3.0  # of the recipe, whose model may be a small one; ten steps of a large one take longer
MAX_NEW_TOKENS = 12
RECIPE_STEPS = 100


class Child:
    """The training run in progress, to which a request to stop is passed on."""

    process: subprocess.Popen | None = None

    @classmethod
    def stop(cls, number: int, frame) -> None:
        """Signal handler: asks the run to stop, and leaves if there is none."""
        if cls.process is None or cls.process.poll() is not None:
            raise SystemExit(128 + number)
        cls.process.send_signal(number)


def main(argv: list[str]) -> int:
    """Runs what argv asks for; returns the exit code. Raises UserError for a mistake in argv."""
    if {"-h", "--help"} & {*argv}:
        print_line(__doc__)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a background job
            signal.signal(number, Child.stop)
    disable_progress_bar()
    if not argv:
        return sanity_of_embedded_default()
    if argv[0] not in ("sft", "dpo"):
        raise UserError(f"`sanity {argv[0]}`: it is sanity, sanity sft [N] [flags] or sanity dpo [N] [flags]")
    return sanity_of_recipe(argv[0], argv[1:])


def sanity_of_embedded_default() -> int:
    """Generates model and data, trains SFT then DPO, compares what both answer; returns the exit code."""
    started = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    heading(f"Generating a tiny model and its data from seed {SEED} in {OUTPUT}")
    write_data(OUTPUT / "data", SEED, NUM_SFT, NUM_PREFERENCES, NUM_HELD_OUT)
    write_model(OUTPUT / "model", SEED)
    print_line(
        "Its tasks: copy, reverse, sort or count letters, name the last. SFT teaches them in two styles of\n"
        "answer, half and half; DPO then prefers one. Held-out questions show what was learned."
    )

    verdict, answers = {}, {}
    questions = read_held_out(OUTPUT / "data")
    for method, flags in (("sft", BOTH | SFT), ("dpo", BOTH | DPO)):
        heading(f"{method.upper()} (everything it prints: {OUTPUT / method}.log)")
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        exit_code, output = train([method, *words], OUTPUT / f"{method}.log", sparse=True)
        verdict[method] = judge_run(flags["output_dir"], exit_code, output, SLOW_STEP_FLOOR)
        if exit_code:
            break
        try:
            answers[method] = ask(flags["output_dir"], questions)
        except (OSError, ValueError, RuntimeError) as e:
            verdict[method].append(loads(False, f"{type(e).__name__}: {e}"))
            break
        verdict[method].append(loads(True, "yes"))
    else:
        heading(f"Talking to both models: {len(questions)} held-out questions, these among them")
        show_examples(questions, answers)
        scores = {method: score(questions, texts) for method, texts in answers.items()}
        verdict["answers"] = judge_answers(scores["sft"], scores["dpo"])
    return conclude(verdict, OUTPUT / "sanity.json", time.perf_counter() - started, exit_code)


def sanity_of_recipe(method: str, argv: list[str]) -> int:
    """100 steps of the real recipe, the full run's schedule, a folder of its own; returns the exit code."""
    started = time.perf_counter()
    num_ranks, flags = (argv[0], argv[1:]) if argv and argv[0].isdecimal() else ("1", argv)
    if num_ranks == "0" or (flags and not flags[0].startswith("--")):
        raise UserError(f"sanity {method} {' '.join(argv)}: it is sanity sft|dpo [N] [flags], N 1 or more")
    given = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    output_dir = Path(f"output/sanity-{method}")
    if "output_dir" in given:
        raise UserError(f"sanity writes to {output_dir}, which it wipes: --output_dir is not for it")
    for name, value in (("stop_after_steps", RECIPE_STEPS), ("logging_steps", 1)):
        flags = flags if name in given else [*flags, f"--{name}", str(value)]
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    heading(f"{method.upper()}: the recipe's first steps (everything it prints: {output_dir}/sanity.log)")
    exit_code, output = train(
        [method, num_ranks, *flags, "--output_dir", str(output_dir)], output_dir / "sanity.log", sparse=False
    )
    if exit_code == UserError.EXIT_CODE:  # it has said what was wrong
        return exit_code
    verdict = {method: judge_run(output_dir, exit_code, output, RECIPE_SLOW_STEP_FLOOR)}
    return conclude(verdict, output_dir / "sanity.json", time.perf_counter() - started, exit_code)


def train(words: list[str], log: Path, sparse: bool) -> tuple[int, str]:
    """Runs `bash run.sh WORDS`; returns its exit code and all that it printed, which goes to `log` too.

    sparse: of the lines of single steps, show about ten.
    """
    lines = []
    # A session of its own: a terminal's Ctrl-C then arrives once, through Child.stop.
    Child.process = subprocess.Popen(
        ["bash", str(RUN_SH), *words],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with (
        open(log, "w", encoding="utf-8", newline="") as file,
        io.TextIOWrapper(Child.process.stdout, encoding="utf-8", errors="replace", newline="") as printed,
    ):
        for line in printed:  # up to a newline, or to the carriage return of a progress bar
            lines.append(line)
            file.write(line)
            if is_shown(line, sparse):
                print_line(line, end="")
    return Child.process.wait(), "".join(lines)


def is_shown(line: str, sparse: bool) -> bool:
    """Whether to show a line of a run: progress bars only on a real terminal, about ten lines of steps."""
    if line.endswith("\r"):
        return sys.stdout.isatty()
    step = re.match(r"step (\d+)/(\d+) ", line)
    if not step or not sparse:
        return True
    this, last = int(step[1]), int(step[2])
    return this in (1, last) or this % max(1, last // 10) == 0


def ask(folder: Path, questions: list[Question]) -> list[str]:
    """The greedy answer to each question of an exported model, through plain transformers.

    Raises what from_pretrained raises, and ValueError if weights are missing or left over.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: keys for name, keys in report.items() if keys}
    if problems:
        raise ValueError(f"weights do not fit: {problems}")
    by_length = defaultdict(list)  # prompts of one length need no padding
    for i, question in enumerate(questions):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        by_length[len(ids)].append((i, ids))
    answers = [""] * len(questions)
    for length, batch in by_length.items():
        prompts = torch.tensor([ids for _, ids in batch])
        outputs = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )
        for (i, _), output in zip(batch, outputs, strict=True):
            answers[i] = tokenizer.decode(output[length:], skip_special_tokens=True)
    return answers


def score(questions: list[Question], texts: list[str]) -> Score:
    """Counts right answers (in either style) and answers in the chosen style (right or wrong)."""
    read = [read_answer(text) for text in texts]
    num_right = sum(answer == q.answer for q, (answer, _) in zip(questions, read, strict=True))
    return Score(len(questions), num_right, sum(in_chosen_style for _, in_chosen_style in read))


def show_examples(questions: list[Question], answers: dict[str, list[str]], num_examples: int = 6) -> None:
    """Prints the first few questions with what each model said."""

    def cell(question: Question, text: str) -> str:
        return f"{text!r:18} {'right' if read_answer(text)[0] == question.answer else 'WRONG'}"

    for i, question in enumerate(questions[:num_examples]):
        print_line(
            f"  {question.prompt:22}"
            + "".join(f"  {method.upper()}: {cell(question, texts[i])}" for method, texts in answers.items())
        )


def loads(passed: bool, seen: str) -> Check:
    """The check that an exported folder is an ordinary Hugging Face model."""
    return Check("exported model loads", "by from_pretrained, every weight", seen, passed)


def conclude(verdict: dict[str, list[Check]], path: Path, seconds: float, exit_code: int) -> int:
    """Prints the verdict, writes it to path as JSON, returns sanity's exit code.

    verdict: checks by part. exit_code: of the last run, and sanity's own if that run was stopped on request.
    """
    passed = all(check.passed for checks in verdict.values() for check in checks)
    for part, checks in verdict.items():
        heading({"answers": "Verdict: what they answer"}.get(part, f"Verdict: {part.upper()}"))
        print_line(format_table(checks, colour=sys.stdout.isatty()))
    record = {
        "passed": passed,
        "seconds": round(seconds, 1),
        "checks": [
            {"part": part, **asdict(check), **({} if check.passed else {"advice": check.advice})}
            for part, checks in verdict.items()
            for check in checks
        ],
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    num_failed = sum(not check["passed"] for check in record["checks"])
    outcome = "every check passed" if passed else f"{num_failed} of {len(record['checks'])} checks FAILED"
    print_line(f"\n{outcome} in {seconds:.0f} s; see {path}")
    if exit_code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return exit_code
    return 0 if passed else 1


def heading(text: str) -> None:
    """Prints a line that begins a part."""
    print_line(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        print_line(f"error: {e}", sys.stderr)
        sys.exit(UserError.EXIT_CODE)
