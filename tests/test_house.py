"""The house stays as it was built: sizes, direction of imports, one home a fact. pytest tests/test_house.py"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("train_*.py"))
PRODUCT = [*SCRIPTS, *sorted((ROOT / "common").rglob("*.py"))]
# What decides the numbers of a step.
NUMBERS = [
    *SCRIPTS,
    *(ROOT / "common" / name for name in ("data/chat_template.py", "data/tokens.py")),
    *sorted((ROOT / "common" / "step").glob("*.py")),
    *(ROOT / "common" / "model" / f"{name}.py" for name in ("packed", "attention", "recurrent", "logprobs", "summing")),
    *(ROOT / "common" / "zero" / f"{name}.py" for name in ("opening", "residency", "engine")),
]
# From the outside in: a room may import itself and what comes after it.
ROOMS = ("script", "verbs", "run", "zero", "model", "step", "data", "ranks", "files", "config", "failures")


def lines(*paths: Path) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for path in paths for line in path.read_text(encoding="utf-8").splitlines())


def room_of(module: str) -> str:
    """The room of a module's dotted name: `common.zero.engine` -> zero, `train_sft` -> script."""
    parts = module.split(".")
    if parts[0] != "common":
        return "script"
    return {"stopping": "ranks", "interrupts": "failures"}.get(parts[1], parts[1])


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("common"):
            is_room = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_room else {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("common.")}
    return found


def test_the_product_can_be_read_in_an_afternoon():
    """The aim is 5,000 lines, 1,800 of them in what decides a step's numbers. Until then it does not grow."""
    assert lines(*PRODUCT, ROOT / "run.sh") <= 8849
    assert lines(*NUMBERS) <= 2591


def test_the_tests_are_not_longer_than_they_need_to_be():
    """The aim is about 5,000 lines. Until then they do not grow."""
    assert lines(*(ROOT / "tests").glob("*.py")) <= 10792


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    allowed = ROOMS[ROOMS.index(room_of(own)) :] if path.name != "__init__.py" else ()
    assert {module: room_of(module) for module in imports(path) if room_of(module) not in allowed} == {}


def test_no_module_imports_itself_in_a_circle():
    graph = {".".join(p.relative_to(ROOT).with_suffix("").parts): imports(p) for p in PRODUCT}
    done: set[str] = set()
    while ready := {module for module, needed in graph.items() if module not in done and needed & graph.keys() <= done}:
        done |= ready
    assert graph.keys() - done == set()


def test_only_one_room_knows_torch_distributed_or_deepspeed():
    """data/ and step/ work without either; step/ touches no file."""
    for path in sorted((ROOT / "common" / "data").glob("*.py")) + sorted((ROOT / "common" / "step").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"torch\.distributed|deepspeed", text, re.IGNORECASE) or path.name == "__init__.py", path
        if path.parent.name == "step":
            assert not re.search(r"\bopen\(|pathlib|\bos\.", text), path


PRIVATE = re.compile(
    r"fp16_groups|fp16_partitioned|fp32_partitioned|grad_partitions_flat|ipg_buckets|averaged_gradients|lp_param_buffer"
    r"|parameter_offload|dp_process_group|exit_backward|sub_group_to_group_id|\bzero\._\w+|optimizer\._\w+"
)


def test_private_names_of_deepspeed_have_one_home():
    touching = {p.name for p in PRODUCT if PRIVATE.search(p.read_text(encoding="utf-8"))}
    assert touching == {"residency.py"}


def test_files_that_a_run_or_a_test_makes_are_ignored():
    for name in (".venv", "output/x", "common/__pycache__/x"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("words", ["ruff check .", "ruff format --check .", "mypy"])
def test_ruff_and_mypy_have_nothing_to_say(words):
    command = [sys.executable, "-m", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_no_line_is_kept_from_the_formatter():
    held = [path.name for path in [*PRODUCT, *(ROOT / "tests").glob("*.py")] if "fmt: " + "skip" in path.read_text()]
    assert held == []
