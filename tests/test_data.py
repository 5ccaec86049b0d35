"""bash run.sh data sft|dpo: what would be trained, shown.   pytest tests/test_data.py"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizer
import torch
from models import write_jsonl as write

from common.failures import UserError
from common.verbs.data import main

REPO = Path(__file__).parents[1]


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Of a folder that holds a tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.tiny_tokenizer().save_pretrained(folder)
    return ["--model_name_or_path", str(folder), "--cache_dir", str(folder), "--chat_template", "tulu"]


def shows(capsys, *words: str) -> str:
    assert main(*words) == 0
    return capsys.readouterr().out


def test_lengths_duplicates_ends_and_rows_are_shown(tmp_path, flags, capsys):
    """Lengths, cut samples and repeated rows are counted again here."""
    rows = [chat(f"why {i}?", "so. " * (1 + i % 9)) for i in range(60)]
    rows[7], rows[9], rows[50] = rows[3], rows[3], chat("\x1b[31mred", "\x07bell\u202e\n\nx")
    rows[20] = {"text": "no end is needed"}
    data = str(write(tmp_path / "x.jsonl", [*rows, {"messages": 3}]))
    text = shows(capsys, "sft", "--dataset_mixer", data, "--max_seq_length", "30", "--show", "60", *flags)
    assert not torch.distributed.is_initialized()
    bars = [int(number) for number in re.findall(r"^ +\d+ to +\d+ +(\d+) *#*$", text, re.MULTILINE)]
    titles = re.findall(r"^sample (\d+) \((.*)\):$", text, re.MULTILINE)
    assert sum(bars) == 60 and titles == [(str(i), f"{data}:{i + 1}") for i in range(60)]
    num_cut = int(re.search(r"^truncated: (\d+) of 60", text, re.MULTILINE)[1])
    assert f"exact duplicates of another row: 2; first {data}:8 is {data}:4\n" in text
    assert 0 < num_cut == len(re.findall(r"(?<!<eos>)]]", text))
    assert f"without an end token (of 60): {num_cut}\n" in text
    assert "\\x1b[31mred" in text and "\\x07bell\\u202e\n\nx" in text and not {*"\x1b\x07\u202e"} & {*text}
    assert re.search(rf"^  `messages` must be a list, not int +1; first {data}:61$", text, re.MULTILINE)


def test_a_row_is_shown_or_the_reason_why_it_is_not_trained(tmp_path, flags, capsys):
    data = str(write(tmp_path / "x.jsonl", [chat(f"why {i}?", "so.") for i in range(20)] + [chat("why 20?", "")]))
    words = ["sft", "--dataset_mixer", f"{data}=50%", *flags, "--allow_dropped", "true", "--row"]
    taken = {int(i) for i in np.random.RandomState(42).choice(21, size=10, replace=False)}
    kept, other = min(taken), min({*range(20)} - taken)
    text = shows(capsys, *words, f"{data}:{kept + 1}", f"{data}:{other + 1}", f"{data}:21")
    assert text.count("sample ") == 1 and f"why {kept}?" in text and "[[so.<eos>]]" in text
    assert f"{data}:{other + 1}: not trained: not one of the 10 rows taken" in text
    assert f"{data}:21: not trained: empty assistant turn" in text
    for absent in (f"{data}:22", f"{data}:0", "x.jsonl:1", "x.jsonl", f"{data}:x"):
        with pytest.raises(UserError, match="--row"):
            main(*words, absent)


def test_pairs_that_differ_in_white_space_only_are_counted(tmp_path, flags, capsys):
    rows = [pair(f"why {i}?", f"so {i}.", "no.") for i in range(20)]
    rows[4], rows[5] = pair("why?", "so it is", "so  it\nis "), pair("why 3?", "so 3.", "no.")
    data = str(write(tmp_path / "x.jsonl", rows))
    text = shows(capsys, "dpo", "--dataset_mixer", data, *flags)
    assert re.search(rf"^  chosen and rejected differ in white space only +1; first {data}:5$", text, re.MULTILINE)
    assert f"another row: 1; first {data}:6 is {data}:4" in text and "without an end token (of 40): 0" in text
    assert text.count("--- chosen:") == 5


def test_what_a_run_would_refuse_is_shown_and_refused(tmp_path, flags, capsys):
    data = str(write(tmp_path / "x.jsonl", [chat("why?", "so.")] * 4 + [{"messages": 3}]))
    with pytest.raises(UserError, match="--allow_dropped"):
        main("sft", "--dataset_mixer", data, *flags)
    assert "[[so.<eos>]]" in capsys.readouterr().out


def test_a_file_whose_name_is_no_utf_8_is_read_and_shown(tmp_path, flags):
    """In a process of its own, through the command line."""
    data = os.fsencode(tmp_path) + b"/x\xff.jsonl"
    Path(os.fsdecode(data)).write_text(json.dumps(chat("why?", "so.")))
    command = [sys.executable, "-P", "-m", "common.verbs", "data", "sft", *flags, "--dataset_mixer", data]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "x\\udcff.jsonl:1" in done.stdout and "[[so.<eos>]]" in done.stdout
