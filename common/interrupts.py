"""The answer to a Ctrl-C while modules are imported, which takes seconds. This one imports next to nothing."""

import os
import signal

NOT_BEGUN = "stopped before training: what earlier runs saved stands, and the same command begins where they ended"


def answer_interrupts(text: str = NOT_BEGUN) -> None:
    """From here on a Ctrl-C ends this process with a line, of one rank, and exit code 130. One that is ignored, as in
    the background of a script, stays so."""

    def leave(*_) -> None:
        os.write(2, f"\r{text}\n".encode() if os.environ.get("RANK", "0") == "0" else b"")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)
