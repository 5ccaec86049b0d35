"""What the rendering of a chat template may take: a template is a program of the user's, which may never end."""

import ctypes
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2.filters import FILTERS, do_round
from jinja2.sandbox import SandboxedEnvironment

RENDER_SECONDS, RENDER_BYTES = 20.0, 2 * 2**30  # of one conversation, once
LARGEST_NUMBER = 4096  # bits of what a product or a power may give


def _binary(environment: SandboxedEnvironment, context, sign: str, left, right):
    """What a template computes with an operator; a TimeoutError for whole numbers so large that this single step, which
    nothing ends, might take forever."""
    if isinstance(left, int) and isinstance(right, int):
        bits = (left.bit_length() - 1) * right if sign == "**" else left.bit_length() + right.bit_length()
        if bits > LARGEST_NUMBER:
            raise TimeoutError
    return environment.binop_table[sign](left, right)


def _round(value, precision=0, method="common"):
    """jinja2's filter, which computes ten to the power of the precision."""
    if isinstance(precision, int) and abs(precision) * 4 > LARGEST_NUMBER:
        raise TimeoutError
    return do_round(value, precision, method)


SandboxedEnvironment.intercepted_binops, SandboxedEnvironment.call_binop = frozenset(["*", "**", "//", "%"]), _binary
FILTERS["round"] = _round
_rendering: dict[int, float] = {}  # thread -> when it has to be done
_lock = threading.Lock()
LIMITS = resource.getrlimit(resource.RLIMIT_AS)  # of this process's memory


def _watch() -> None:
    """Ends what takes too long, between two steps of Python."""
    end = ctypes.pythonapi.PyThreadState_SetAsyncExc
    while True:
        time.sleep(0.05)
        with _lock:
            for thread, deadline in list(_rendering.items()):
                if time.monotonic() > deadline:
                    del _rendering[thread]
                    end(ctypes.c_ulong(thread), ctypes.py_object(TimeoutError))


@contextmanager
def bounded() -> Iterator[None]:
    """In it, TimeoutError is raised after RENDER_SECONDS, MemoryError where this process would hold RENDER_BYTES more
    than before."""
    if all(thread.name != "watch of templates" for thread in threading.enumerate()):  # as in a forked process
        threading.Thread(target=_watch, name="watch of templates", daemon=True).start()
    thread, pages = threading.get_ident(), int(Path("/proc/self/statm").read_text().split()[0])
    _rendering[thread] = time.monotonic() + RENDER_SECONDS
    if LIMITS[0] == resource.RLIM_INFINITY:  # else there is one, which stays
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + RENDER_BYTES, LIMITS[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, LIMITS)
        with _lock:
            _rendering.pop(thread, None)
