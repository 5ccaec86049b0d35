"""How a run stops: on a request that the ranks agree on, on numbers that are not finite, and with which exit code."""

import contextlib
import functools
import io
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from common.failures import TrainingStopped, explained, one_line, print_line, shown
from common.ranks import Ranks, is_first_to_tell, lost

SAME_REQUEST = 2.0  # seconds
EXIT_SECONDS = 30.0  # that before_exit may take
before_exit: list[Callable[[], None]] = []  # called before this process ends, whatever ends it but a kill
# What gloo says where a rank has ended or hangs.
LOST_CONNECTION = ("closed by peer", "reset by peer", "Timed out waiting", "Application timeout", "Broken pipe")


class Stopped(Exception):
    """The run was asked to stop, and has written its checkpoint."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def main_with_exit_codes(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a script's main: INTERFACE's exit codes, one `error:` line from one rank, no traceback for 2 and 3."""

    @functools.wraps(main)
    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training there is nothing to save
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal need not be able to show every sample
        code = 0
        try:
            main()
        except Stopped as e:
            code = 128 + e.signal_number
            if is_first_to_tell("stopped"):
                print_line(
                    text := "stopped: all steps so far are in the last checkpoint; --resume auto continues from it"
                )
                if os.path.samestat(os.fstat(1), os.stat(os.devnull)):  # as once a Ctrl-C has ended its `tee`
                    print_line(text, sys.stderr)
        except Exception as e:
            known = explained(e)
            code = known.EXIT_CODE if known else 1
            told = text = f"error: {shown(str(known))}" if known else traceback.format_exc()
            if not known and (isinstance(e, dist.DistError) or any(sign in str(e) for sign in LOST_CONNECTION)):
                told, text = "a rank is lost", lost(one_line(e))
            if not getattr(e, "is_told", False) and is_first_to_tell(told):
                print_line(text, sys.stderr)
        closing = threading.Thread(target=lambda: [close() for close in before_exit], daemon=True)
        closing.start()
        closing.join(EXIT_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            print_line("", stream, end="")
        if dist.is_initialized():
            if not code:  # else the others may sit in a collective: no clean-up can wait for them
                dist.destroy_process_group()  # a rank that is gone without it is lost for the others
            # Threads may be in torch's C++, the watch's in the store or gloo's at the end of its work: they abort a
            # process in which Python's own end is under way.
            os._exit(code)
        raise SystemExit(code)

    return run


class StopRequest:
    """Remembers SIGTERM or SIGINT until the ranks agree on it at a step boundary.

    Handlers are installed when the loop starts: before it nothing is lost by stopping at once. A request that repeats
    before the answer, or within SAME_REQUEST seconds of it, is the same one: a terminal's Ctrl-C arrives from the
    terminal and again from the launcher. A later one leaves at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.signal_number = 0
        self.answered_at = math.inf  # time.monotonic()
        self.is_exporting = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        if "PLAINTUNE_RUN_SH" not in os.environ and {"CROSS_RANK", "TORCHELASTIC_RUN_ID"} & {*os.environ}:
            ranks.say("note: when asked to stop, this launcher gives a checkpoint 30 s; `bash run.sh` waits for it")

    def _receive(self, number: int, frame) -> None:
        if time.monotonic() > self.answered_at + SAME_REQUEST:
            os._exit(128 + number)
        self.signal_number = self.signal_number or number
        self._answer_export_first()

    def _answer_export_first(self) -> None:
        if self.is_exporting and self.signal_number and self.answered_at == math.inf:
            self.answered_at = time.monotonic()
            with contextlib.suppress(OSError):  # nobody may be there to read it
                os.write(1, b"asked to stop: the steps are done; writing the model first; ask again to leave now\n")

    def finish_export_first(self) -> None:
        """From here on there is no step boundary to come: a request waits for the export, a second one does not."""
        self.is_exporting = True
        self._answer_export_first()  # of a request after the ranks' last vote

    def votes(self) -> tuple[int, int]:
        """(1, 0) if this rank was asked by SIGTERM, (0, 1) if by SIGINT: ranks add them up and agree."""
        return int(self.signal_number == signal.SIGTERM), int(self.signal_number == signal.SIGINT)

    def agreed(self, terminate: float, interrupt: float, ranks: Ranks) -> int:
        """The signal to stop for, 0 to go on, from the sums of all ranks' votes; the same on every rank."""
        if not terminate and not interrupt:
            return 0
        self.answered_at = time.monotonic()
        ranks.say("asked to stop: writing a checkpoint first; ask again to leave without it")
        return signal.SIGTERM if terminate else signal.SIGINT


def not_finite(
    step: int, what: str, value: float, micro_batches: list[list[int]], losses: list[float] | None, lengths, data, ranks
) -> TrainingStopped:
    """What to raise for a loss or gradient that is not finite; nothing was updated. Collective.

    micro_batches: this rank's samples; losses: of each micro-batch, or None; lengths: tokens of each sample.
    """
    mine = []
    for m, members in enumerate(micro_batches):
        if members and (losses is None or not math.isfinite(losses[m])):
            samples = [data.source_of(i) for i in members[:8]]
            samples += [f"and {len(members) - 8} more"] * (len(members) > 8)
            tokens = sum(int(lengths[i]) for i in members)
            mine.append(f"rank {ranks.rank}, micro-batch {m + 1} of {tokens:,} tokens: {', '.join(samples)}")
    named = [place for places in ranks.gather(lambda: mine) for place in places]
    named[4:] = [f"and {len(named) - 4} micro-batches more"] * (len(named) > 4)
    return TrainingStopped(
        f"step {step}: the {what} is {value} and nothing was updated ({'; '.join(named)}). Try a lower --learning_rate "
        f"or, in bfloat16, --dtype float32, or look at those samples; a checkpoint that was written stands"
    )
