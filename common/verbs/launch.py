"""bash run.sh sft|dpo [N] [flags]: starts N ranks on this machine (default: a GPU each; without a GPU, 2 on the CPU).

SIGTERM, SIGINT and SIGHUP ask the ranks to stop; a third request, or SIGQUIT, kills them. If this process is killed,
its ranks are asked to stop. Neither torch nor DeepSpeed is imported here: that takes seconds, and only ranks need them.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from types import ModuleType

from common.config import DPOConfig, SFTConfig, parse_config
from common.failures import UserError, as_user_error, explained, print_line, shown
from common.run import disk

REPO = Path(__file__).resolve().parents[2]
GRACE = 30.0  # seconds that the other ranks have to end by themselves once one has failed
PROMPT = 3.0  # seconds until they are named: after an error that all know they have ended by then; its line stands last
ANSWER = 10.0  # seconds after a request to stop until the ranks that still run are named
ASK = "asking the ranks to stop: training saves first. A second request: it ends unsaved; a third: they are killed"
PRCTL, PR_SET_PDEATHSIG = ctypes.CDLL(None).prctl, 1  # linux/prctl.h


def visible_gpus() -> list[str]:
    """The GPUs that a run may use, as CUDA_VISIBLE_DEVICES names them; none where torch is a CPU build."""
    if version("torch").endswith("+cpu"):
        return []
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, names.split(","))))
    listed = subprocess.run("nvidia-smi -L", shell=True, capture_output=True, text=True).stdout  # '' if it is missing
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def split_number(words: list[str], default: int | None = None) -> tuple[int, list[str]]:
    """`[N] [flags]` -> the number of ranks, and the flags. Raises UserError for 0, and for more than there are GPUs."""
    num_gpus = len(visible_gpus())
    number = default or num_gpus or 2
    if words and words[0].isdecimal():
        number, words = int(words[0]), words[1:]
    if number < 1 or 0 < num_gpus < number:
        raise UserError(f"N = {number}: it is 1 or more, and no more than the GPUs that were found ({num_gpus})")
    return number, words


def start(command: list[str], **options) -> subprocess.Popen:
    """Starts a command that gets SIGTERM if this process dies, in a session of its own, where no Ctrl-C reaches it."""
    options |= dict(stdin=subprocess.DEVNULL, start_new_session=True)
    return subprocess.Popen(command, preexec_fn=lambda: PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM), **options)


def start_run(words: list[str]) -> subprocess.Popen:
    """Starts `bash run.sh WORDS`, with WORDS = sft|dpo [N] [flags]; stdout gives the text of stdout and stderr."""
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    return start([sys.executable, "-P", "-m", "common.verbs", "launch", *words], **pipe)


def on_request_to_stop(answer: Callable[[int], object]) -> None:
    """Calls answer(signal number) for each request to stop that comes from now on."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda number, _: answer(number))


def launch(command: list[str], environment: dict[str, str], num_ranks: int) -> int:
    """Runs `command` as num_ranks ranks until all have ended; those that hang once another has failed are killed.

    Returns the exit code (128 + signal) of the rank that failed first; of several the highest: a lost peer makes 1.
    """
    requests: list[int] = []
    on_request_to_stop(requests.append)
    ranks = [start(command, env=environment | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(num_ranks)]
    codes, num_answered, exit_code = [rank.poll() for rank in ranks], 0, 0
    kill_at = tell_at = math.inf
    while None in codes:
        if time.monotonic() > kill_at:
            requests.append(signal.SIGQUIT)
            kill_at = math.inf
        if len(requests) > num_answered:
            is_kill = num_answered == 2 or requests[num_answered] == signal.SIGQUIT
            num_answered, tell_at = num_answered + 1, time.monotonic() + ANSWER
            say("killing the ranks" if is_kill else ASK)
            for rank in ranks:  # not SIGINT: a rank that is still importing would print a traceback
                rank.send_signal(signal.SIGKILL if is_kill else signal.SIGTERM)
        time.sleep(0.1)
        codes = [rank.poll() for rank in ranks]
        if not exit_code and (exit_code := max((128 - c if c < 0 else c for c in codes if c), default=0)):
            kill_at, tell_at = time.monotonic() + GRACE, time.monotonic() + PROMPT
        if None in codes and time.monotonic() > tell_at:
            tell_at = math.inf
            left = ", ".join(f"rank {i}: {state_of(ranks[i].pid)}" for i, code in enumerate(codes) if code is None)
            why = f"a rank ended with {exit_code} (137: often for the host's memory); killed in {GRACE:g} s if "
            say(f"{why * (exit_code > 0)}still running: {left}")
    if {*codes} - {0} == {-signal.SIGTERM}:  # they had nothing to save yet
        say("stopped before training: what earlier runs saved stands, and the same command begins where they ended")
    return 130 if requests[:1] == [signal.SIGINT] and exit_code == 143 else exit_code


def state_of(pid: int) -> str:
    """`S (sleeping)`, `T (stopped)`: one that a SIGSTOP or a debugger has stopped answers nothing."""
    return Path(f"/proc/{pid}/status").read_text().partition("State:\t")[2].splitlines()[0]


def say(text: str) -> None:
    print_line(f"run.sh: {text}", sys.stderr)


def main(method: str, *words: str) -> int:
    """Runs train_sft.py or train_dpo.py where the user stands; returns the exit code. Raises UserError, before torch's
    import, also for a folder that is missing or cannot be made, and a disk that is too small whatever the data."""
    gpus = visible_gpus()
    num_ranks, flags = split_number([*words])
    sys.argv = [f"train_{method}.py", *flags]
    config = parse_config(SFTConfig if method == "sft" else DPOConfig)  # which also answers --help
    if config.resume not in ("auto", "never") and not Path(config.resume).is_dir():
        raise UserError(f"--resume {config.resume}: neither auto, never nor a folder")
    with as_user_error(f"--output_dir {config.output_dir}: cannot be made", OSError):
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        disk.require_least(config)
    environment = os.environ | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_ranks))
    environment["PYTHONSAFEPATH"] = "1"  # no module of the folder where the user stands comes before the project's
    environment["PYTHONPATH"] = f"{REPO}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    environment["PLAINTUNE_RUN_SH"] = "1"  # tells the ranks that a stop waits for their checkpoint
    environment |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:num_ranks])} if gpus else {"DS_ACCELERATOR": "cpu"}
    say(f"{num_ranks} ranks on {'GPUs' if gpus else 'the CPU'}: importing torch, transformers and DeepSpeed")
    return launch([sys.executable, "-u", str(REPO / f"train_{method}.py"), *flags], environment, num_ranks)


def exit_with(verb: ModuleType) -> None:
    """Ends a verb with its main's exit code; a mistake, or a full disk, becomes one line. --help prints what the verb's
    module says of itself, but for this one, whose main answers it."""
    if verb.__name__ != __name__ and {"-h", "--help"} & {*sys.argv[1:]}:
        return print_line(str(verb.__doc__))
    try:
        code = verb.main(*sys.argv[1:])
        print_line("", end="")
        os._exit(code)  # taking torch down, where a verb has imported it, takes seconds
    except Exception as e:
        if (known := explained(e)) is None:
            raise
        print_line(f"error: {shown(str(known))}", sys.stderr)
        sys.exit(known.EXIT_CODE)
