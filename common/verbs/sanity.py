"""Sanity, end to end: does this machine, with this code, train?

    bash run.sh sanity                        # the embedded default: SFT, DPO, talk to both, judge
    bash run.sh sanity sft|dpo [N] [flags]    # 100 steps of the real recipe on N GPUs, judged; flags as of the script

Writes to output/sanity; the recipe to output/sanity-sft or -dpo, which it wipes first. Trains as `bash run.sh sft|dpo`
does. Exits 0 only if every check passes, 1 if one fails, 2 on a mistake in the command, 143 or 130 when stopped.
torch and transformers, whose import takes seconds, are imported while the first run trains.
"""

import io
import json
import re
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from threading import Thread

from common.failures import UserError, print_line
from common.verbs.judge import Check, Score, format_table, judge_answers, judge_run
from common.verbs.launch import exit_with, on_request_to_stop, split_number, start_run, visible_gpus
from common.verbs.sanity_data import Question, read_answer, read_held_out, write_data, write_model

SEED = 42
OUTPUT = Path("output/sanity")
NUM_SFT, NUM_PREFERENCES, NUM_HELD_OUT = 6000, 1920, 400
FLAGS = {
    "sft": f"--model_name_or_path {OUTPUT}/model --dataset_mixer {OUTPUT}/data/sft.jsonl --learning_rate 2e-3 "
    f"--num_train_epochs 4 --checkpointing_steps 200 --output_dir {OUTPUT}/sft",
    "dpo": f"--model_name_or_path {OUTPUT}/sft --dataset_mixer {OUTPUT}/data/preferences.jsonl --learning_rate 3.5e-5 "
    f"--loss_type dpo_norm --beta 5 --checkpointing_steps 20 --output_dir {OUTPUT}/dpo",
}
BOTH = f"--global_batch_size 64 --max_seq_length 64 --seed {SEED} --cache_dir {OUTPUT}/cache"
SLOW_STEP_FLOOR = 5.0  # seconds; a tiny model's steps take a tenth of one, and any hiccup ten of those
RECIPE_SLOW_STEP_FLOOR = 3.0  # of the recipe, whose model may be a small one; ten steps of a large one take longer
MAX_NEW_TOKENS = 12
RECIPE_STEPS = 100


def main(*argv: str) -> int:
    """Runs what argv asks for; returns the exit code. Raises UserError for a mistake in argv."""
    if {"-h", "--help"} & {*argv}:
        print_line(__doc__)
        return 0
    if not argv:
        return sanity_of_embedded_default()
    if argv[0] not in ("sft", "dpo"):
        raise UserError(f"`sanity {argv[0]}`: it is sanity, sanity sft [N] [flags] or sanity dpo [N] [flags]")
    return sanity_of_recipe(argv[0], [*argv[1:]])


def sanity_of_embedded_default() -> int:
    """Generates model and data, trains SFT then DPO, compares what both answer; returns the exit code."""
    started = time.perf_counter()
    heading(f"Generating a tiny model and its data from seed {SEED} in {OUTPUT}")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    write_data(OUTPUT / "data", SEED, NUM_SFT, NUM_PREFERENCES, NUM_HELD_OUT)
    write_model(OUTPUT / "model", SEED)
    print_line(
        "Its tasks: copy, reverse, sort or count letters, name the last. SFT teaches them in two styles of\n"
        "answer, half and half; DPO then prefers one. Held-out questions show what was learned."
    )
    verdict, answers = {}, {}
    questions = read_held_out(OUTPUT / "data")
    dtype = "bfloat16" if visible_gpus() else "float32"
    for method, flags in FLAGS.items():
        log = OUTPUT / f"{method}.log"
        heading(f"{method.upper()} (everything it prints: {log})")
        exit_code, output = train([method, *f"{flags} {BOTH} --dtype {dtype}".split()], log, sparse=True)
        verdict[method] = judge_run(OUTPUT / method, exit_code, output, SLOW_STEP_FLOOR)
        if exit_code:
            break
        seen = "yes"
        try:
            answers[method] = ask(OUTPUT / method, questions)
        except (OSError, ValueError, RuntimeError) as e:
            seen = f"{type(e).__name__}: {e}"
        is_loaded = method in answers
        verdict[method].append(Check("exported model loads", "by from_pretrained, every weight", seen, is_loaded))
        if not is_loaded:
            break
    else:
        heading(f"Talking to both models: {len(questions)} held-out questions, these among them")
        show_examples(questions, answers)
        verdict["answers"] = judge_answers(score(questions, answers["sft"]), score(questions, answers["dpo"]))
    return conclude(verdict, OUTPUT / "sanity.json", time.perf_counter() - started, exit_code)


def sanity_of_recipe(method: str, words: list[str]) -> int:
    """100 steps of the real recipe, the full run's schedule, a folder of its own; returns the exit code."""
    started = time.perf_counter()
    num_ranks, flags = split_number(words, default=1)
    output_dir = Path(f"output/sanity-{method}")
    given = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")}
    if "output_dir" in given or (flags and not flags[0].startswith("--")):
        raise UserError(
            f"sanity {method} {' '.join(words)}: it is [N] [flags] without --output_dir: {output_dir} is wiped"
        )
    for name, value in (("stop_after_steps", RECIPE_STEPS), ("logging_steps", 1)):
        flags = flags if name in given else [*flags, f"--{name}", str(value)]
    heading(f"{method.upper()}: the recipe's first steps (everything it prints: {output_dir}/sanity.log)")
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    words = [method, str(num_ranks), *flags, "--output_dir", str(output_dir)]
    exit_code, output = train(words, output_dir / "sanity.log", sparse=False)
    if exit_code == UserError.EXIT_CODE:  # it has said what was wrong
        return exit_code
    verdict = {method: judge_run(output_dir, exit_code, output, RECIPE_SLOW_STEP_FLOOR)}
    return conclude(verdict, output_dir / "sanity.json", time.perf_counter() - started, exit_code)


def train(words: list[str], log: Path, sparse: bool) -> tuple[int, str]:
    """Runs `bash run.sh WORDS`; returns its exit code and all that it printed, which goes to `log` too.

    A request to stop is passed on to it. sparse: of the lines of single steps, show about ten.
    """
    run, lines = start_run(words), []
    on_request_to_stop(lambda number: run.send_signal(number) if run.poll() is None else sys.exit(128 + number))
    Thread(target=import_module, args=("transformers.models.llama.modeling_llama",), daemon=True).start()
    with (
        open(log, "w", encoding="utf-8", newline="") as file,
        io.TextIOWrapper(run.stdout, encoding="utf-8", errors="replace", newline="") as printed,
    ):
        for line in printed:  # up to a newline, or to the carriage return of a progress bar
            lines.append(line)
            file.write(line)
            if is_shown(line, sparse):
                print_line(line, end="")
    return run.wait(), "".join(lines)


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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
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
    """The shares of right answers (in either style), and of answers in the chosen style (right or wrong)."""
    read = [read_answer(text) for text in texts]
    num_right = sum(answer == q.answer for q, (answer, _) in zip(questions, read, strict=True))
    return Score(num_right / len(read), sum(in_chosen_style for _, in_chosen_style in read) / len(read))


def show_examples(questions: list[Question], answers: dict[str, list[str]], num_examples: int = 6) -> None:
    """Prints the first few questions with what each model said."""
    for i, question in enumerate(questions[:num_examples]):
        line = f"  {question.prompt:22}"
        for method, texts in answers.items():
            is_right = read_answer(texts[i])[0] == question.answer
            line += f"  {method.upper()}: {texts[i]!r:18} {'right' if is_right else 'WRONG'}"
        print_line(line)


def conclude(verdict: dict[str, list[Check]], path: Path, seconds: float, exit_code: int) -> int:
    """Prints the verdict, writes it to path as JSON, returns sanity's exit code.

    verdict: checks by part. exit_code: of the last run, and sanity's own if that run was stopped on request.
    """
    records = []
    for part, checks in verdict.items():
        heading({"answers": "Verdict: what they answer"}.get(part, f"Verdict: {part.upper()}"))
        print_line(format_table(checks, colour=sys.stdout.isatty()))
        advice = [{} if check.passed else {"advice": check.advice} for check in checks]
        records += [{"part": part, **asdict(check), **more} for check, more in zip(checks, advice, strict=True)]
    num_failed = sum(not record["passed"] for record in records)
    summary = {"passed": num_failed == 0, "seconds": round(seconds, 1), "checks": records}
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    outcome = f"{num_failed} of {len(records)} checks FAILED" if num_failed else "every check passed"
    print_line(f"\n{outcome} in {seconds:.0f} s; see {path}")
    return exit_code if exit_code in (130, 143) else int(num_failed > 0)


def heading(text: str) -> None:
    """Prints a line that begins a part."""
    print_line(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}")


if __name__ == "__main__":
    exit_with(main)
