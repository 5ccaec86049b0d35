"""python -m common.verbs VERB [...]: what `bash run.sh VERB` runs, a module of this folder."""

import sys
from importlib import import_module

from common.interrupts import answer_interrupts

if __name__ == "__main__":
    answer_interrupts()
    from common.verbs.launch import exit_with

    exit_with(import_module(f"common.verbs.{sys.argv.pop(1)}"))
