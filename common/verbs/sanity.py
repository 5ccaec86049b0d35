"""Sanity, end to end: does this machine, with this code, train?

    bash run.sh sanity                        # the embedded default: SFT, DPO, talk to both, judge
    bash run.sh sanity sft|dpo [N] [flags]    # 100 steps of the real recipe on N GPUs, judged; flags as of the script

Writes to output/sanity, the recipe to output/sanity-sft or -dpo, which it wipes first. Exits 0 only if every check
passes, 1 if one fails, 2 on a mistake in the command, 143 or 130 when stopped.
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path

from common.config import DPOConfig, SFTConfig, parse_config
from common.failures import UserError, one_line, print_line
from common.verbs.judge import ADVICE, Check, format_table, judge_answers, judge_run
from common.verbs.launch import on_request_to_stop, split_number, start_run, visible_gpus
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
# Seconds; steps of the tiny model take a tenth of one, and any hiccup ten of those; the recipe's may be small, too.
SLOW_STEP_FLOOR, RECIPE_SLOW_STEP_FLOOR = 5.0, 3.0
MAX_NEW_TOKENS = 12


def main(*argv: str) -> int:
    """Returns the exit code. Raises UserError for a mistake in argv."""
    if not argv:
        return sanity_of_embedded_default()
    if argv[0] not in ("sft", "dpo"):
        raise UserError(f"`sanity {argv[0]}`: it is sanity, sanity sft [N] [flags] or sanity dpo [N] [flags]")
    return sanity_of_recipe(argv[0], [*argv[1:]])


def sanity_of_embedded_default() -> int:
    """Generates model and data, trains SFT then DPO, compares what both answer; returns the exit code."""
    started = time.perf_counter()
    print_line(f"\n== Generating a tiny model and its data from seed {SEED} in {OUTPUT}")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    write_data(OUTPUT / "data", SEED, NUM_SFT, NUM_PREFERENCES, NUM_HELD_OUT)
    write_model(OUTPUT / "model", SEED)
    print_line("Tasks on letters: SFT teaches two styles of answer, half and half; DPO then prefers one of them.")
    verdict, answers = {}, {}
    questions = read_held_out(OUTPUT / "data")
    dtype = "bfloat16" if visible_gpus() else "float32"
    for method, flags in FLAGS.items():
        words = [method, *f"{flags} {BOTH} --dtype {dtype}".split()]
        exit_code, output = train(words, OUTPUT / f"{method}.log", every=0.1)
        verdict[method] = judge_run(OUTPUT / method, exit_code, output, SLOW_STEP_FLOOR)
        if exit_code:
            break
        try:
            answers[method], seen = ask(OUTPUT / method, questions), "yes"
        except (OSError, ValueError, RuntimeError) as e:
            seen = one_line(e)
        verdict[method].append(Check("exported model loads", "by from_pretrained, every weight", seen, seen == "yes"))
        if seen != "yes":
            break
    else:
        print_line(f"\n== Talking to both models: {len(questions)} held-out questions, these among them")
        for i, question in enumerate(questions[:6]):
            said = [f"{method.upper()}: {texts[i]!r:18}" for method, texts in answers.items()]
            print_line("  ".join([f"  {question.prompt:22}", *said, f"right: {question.answer}"]))
        verdict["answers"] = judge_answers(score(questions, answers["sft"]), score(questions, answers["dpo"]))
    return conclude(verdict, OUTPUT / "sanity.json", time.perf_counter() - started, exit_code)


def sanity_of_recipe(method: str, words: list[str]) -> int:
    """100 steps of the real recipe, the full run's schedule, a folder of its own; returns the exit code."""
    started = time.perf_counter()
    num_ranks, flags = split_number(words, default=1)
    parse_config(SFTConfig if method == "sft" else DPOConfig, flags)  # before anything is wiped
    output_dir = Path(f"output/sanity-{method}")
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir(parents=True)
    ours = "--stop_after_steps 100 --logging_steps 1 --clean_checkpoints_at_end true"  # the user's come later, and win
    words = [method, str(num_ranks), *ours.split(), *flags, "--output_dir", str(output_dir)]
    exit_code, output = train(words, output_dir / "sanity.log")
    if exit_code == UserError.EXIT_CODE:  # it has said what was wrong
        return exit_code
    verdict = {method: judge_run(output_dir, exit_code, output, RECIPE_SLOW_STEP_FLOOR)}
    return conclude(verdict, output_dir / "sanity.json", time.perf_counter() - started, exit_code)


def train(words: list[str], log: Path, every: float = 0.0) -> tuple[int, str]:
    """Runs `bash run.sh WORDS`; returns its exit code and all that it printed, which `log` gets. every: of is_shown."""
    print_line(f"\n== {words[0].upper()} (everything it prints: {log})")
    run = start_run(words)
    on_request_to_stop(lambda number: run.send_signal(number) if run.poll() is None else sys.exit(128 + number))
    with open(log, "w", encoding="utf-8") as file:
        for line in run.stdout or ():
            file.write(line)
            if is_shown(line, every):
                print_line(line, end="")
    return run.wait(), log.read_text(encoding="utf-8")


def is_shown(line: str, every: float) -> bool:
    """Whether to show a line of a run: no progress bar, and of the lines of steps one for each share `every` of all."""
    if not (step := re.match(r"step (\d+)/(\d+) ", line)):
        return "%|" not in line
    this, last = int(step[1]), int(step[2])
    return this in (1, last) or this % max(1, int(last * every)) == 0


def ask(folder: Path, questions: list[Question]) -> list[str]:
    """An exported model's greedy answer to each question. Raises ValueError if weights are missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(report.values()):
        raise ValueError(f"weights do not fit: {report}")
    chats = [[{"role": "user", "content": question.prompt}] for question in questions]
    form = dict(add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt")
    prompts = tokenizer.apply_chat_template(chats, **form)
    outputs = model.generate(**prompts, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return tokenizer.batch_decode(outputs[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def score(questions: list[Question], texts: list[str]) -> tuple[float, float]:
    """The shares of right answers (in either style), and of answers in the chosen style (right or wrong)."""
    read = [read_answer(text) for text in texts]
    num_right = sum(answer == q.answer for q, (answer, _) in zip(questions, read, strict=True))
    return num_right / len(read), sum(in_chosen_style for _, in_chosen_style in read) / len(read)


def conclude(verdict: dict[str, list[Check]], path: Path, seconds: float, exit_code: int) -> int:
    """Prints the verdict (checks by part), writes it to path as JSON; sanity's exit code from that of the last run."""
    records = []
    for part, checks in verdict.items():
        print_line(f"\n== Verdict: {part.upper()}\n{format_table(checks)}")
        for check in checks:
            records.append({"part": part, **check._asdict()} | ({} if check.passed else {"advice": ADVICE[check.name]}))
    num_failed = sum(not record["passed"] for record in records)
    summary = {"passed": num_failed == 0, "seconds": round(seconds, 1), "checks": records}
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    outcome = f"{num_failed} of {len(records)} checks FAILED" if num_failed else "every check passed"
    print_line(f"\n{outcome} in {seconds:.0f} s; see {path}")
    return exit_code if exit_code in (130, 143) else int(num_failed > 0)
