"""How a run stops: signals that the ranks agree on, and exit codes."""

import contextlib
import functools
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from common.failures import TrainingStopped, UserError, full_disk, is_out_of_memory, print_line
from common.ranks import Ranks, started

SAME_REQUEST = 2.0  # seconds


def main_with_exit_codes(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a script's main: INTERFACE's exit codes, one `error:` line from one rank, no traceback for 2 and 3."""

    @functools.wraps(main)
    def run() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training there is nothing to save
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # a terminal need not be able to show every sample
        code = 0
        try:
            main()
        except (UserError, TrainingStopped) as e:
            code = e.EXIT_CODE
            if os.environ.get("RANK", "0") == "0" or getattr(e, "on_this_rank_only", False):
                print_line(f"error: {e}", sys.stderr)
        except Stopped as e:
            code = 128 + e.signal_number
        except Exception as e:
            if (stopped := full_disk(e)) is not None:
                code = stopped.EXIT_CODE
                print_line(f"error: {stopped}", sys.stderr)
            elif is_out_of_memory(e):
                code = TrainingStopped.EXIT_CODE
                reason = (str(e).strip() or type(e).__name__).splitlines()[0]
                rank = os.environ.get("RANK", "0")
                print_line(
                    f"error: rank {rank}: out of memory before or after a micro-batch ({reason}): the model and its "
                    f"optimizer need more devices, or a --ds_config that offloads",
                    sys.stderr,
                )
            else:
                code = 1
                print_line(traceback.format_exc(), sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            print_line("", stream, end="")
        if (ranks := started()) is not None:
            ranks.leave()
        if code == 0 and dist.is_initialized():
            dist.destroy_process_group()
        if code and dist.is_initialized():
            os._exit(code)  # the other ranks may sit in a collective: no clean-up can wait for them
        raise SystemExit(code)

    return run


class Stopped(Exception):
    """The run was asked to stop, and has written its checkpoint."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopRequest:
    """Remembers SIGTERM or SIGINT until the ranks agree on it at a step boundary.

    Before training nothing is lost by stopping at once, so handlers are installed when the loop starts.
    A request that repeats before it was answered, or within SAME_REQUEST seconds of that (a terminal's Ctrl-C
    arrives from the terminal and again from the launcher), is the same request; a later one leaves at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.signal_number = 0
        self.answered_at = math.inf  # time.monotonic()
        self.is_exporting = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        if "PLAINTUNE_RUN_SH" not in os.environ and {"CROSS_RANK", "TORCHELASTIC_RUN_ID"} & {*os.environ}:
            ranks.say(
                "note: this launcher, when it is asked to stop, gives the ranks 30 s, which may not do for a "
                "checkpoint: the last periodic one stands then. `bash run.sh` waits for as long as it takes"
            )

    def _receive(self, number: int, frame) -> None:
        if time.monotonic() > self.answered_at + SAME_REQUEST:
            os._exit(128 + number)
        self.signal_number = self.signal_number or number
        if self.is_exporting:
            self._answer_export_first()

    def _answer_export_first(self) -> None:
        if self.answered_at == math.inf:
            self.answered_at = time.monotonic()
            with contextlib.suppress(OSError):  # nobody may be there to read it
                os.write(1, b"asked to stop: the steps are done; writing the model first; ask again to leave now\n")

    def wait_for_export(self) -> None:
        """From here on there is no step boundary to come: a request waits for the export, a second one does not."""
        self.is_exporting = True
        if self.signal_number:  # it came after the ranks' last vote
            self._answer_export_first()

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
