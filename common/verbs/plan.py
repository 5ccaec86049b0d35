"""What a run would do, before it costs anything: no GPU, no weights, one process.

    bash run.sh plan sft|dpo [N] [--gpu a100-80gb|h100|h200|b200] [--host_memory_gb GB] [--mfu 0.4]
                             [--gpu_hour_price PRICE] [flags of the script]

N: GPUs, of which at most 8 are in one host. --gpu: without it the GPU that is here, else h100. --host_memory_gb: of one
host. --mfu: in place of the one predicted. Of a model only config.json and the tokenizer are read. Data that no cache
holds yet is tokenized, or, of more than 2,000 rows, a draw of so many. Exits with 2 where the run would.
"""

import math
import textwrap

from common.config import DPOConfig, SFTConfig, parse_config
from common.failures import UserError, print_line
from common.verbs.launch import visible_gpus
from common.verbs.words import before_imports, parsed

GPUS = ("a100-80gb", "h100", "h200", "b200")


def main(*argv: str) -> int:
    """Returns the exit code. Raises UserError for a mistake in argv, and for what the run would refuse."""
    num_here = len(visible_gpus())
    flags_of_plan: dict = {"gpu": {"choices": GPUS, "default": None if num_here else "h100"}}
    flags_of_plan |= {name: {"type": float} for name in ("host_memory_gb", "mfu")}
    method, own, flags = parsed("plan", argv, **flags_of_plan)
    num_gpus = int(flags.pop(0)) if flags and flags[0].isdecimal() else num_here or 8
    if (
        num_gpus < 1
        or not 0 < (1 if own.mfu is None else own.mfu) <= 1
        or not 0 <= (own.host_memory_gb or 0) < math.inf
    ):
        raise UserError("N is 1 or more, --mfu is above 0 and at most 1, --host_memory_gb is 0 or more")
    config = parse_config(SFTConfig if method == "sft" else DPOConfig, flags)
    before_imports()
    from common.run.plan_table import WIDTH, Machine, as_text, plan_table

    machine = Machine(num_gpus, own.gpu, own.host_memory_gb)
    rows, warnings = plan_table(method, config, machine, own.mfu)
    print_line(as_text(rows))
    for line in warnings:
        line = f"warning: {line.removeprefix('warning: ')}"
        print_line(textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))
    return 0
