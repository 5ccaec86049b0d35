"""The model that is trained is the model of the folder, and what is exported is what was trained.

pytest tests/test_model.py
"""

import contextlib
import itertools
import json
import logging.handlers
import re
import resource
import shutil
import warnings
from pathlib import Path
from unittest.mock import patch

import launch
import models
import pytest
import reference
import tiny_tokenizer
import torch
from faults import Crash, Disk
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common import files
from common import ranks as distributed
from common.config import SFTConfig
from common.data.chat_template import TULU, ChatTemplate, resolve_template
from common.failures import UserError
from common.files import write_file
from common.model import export, packed
from common.model import load as model
from common.model.attention import SINKS, SOFT_CAP, WINDOWS, registered_name
from common.model.experts import GROUPED, experts_in
from common.model.packed import PackedModel
from common.run.metrics import flops_per_token
from common.run.output_dir import _holds_model
from common.verbs import export as verbs_export
from common.zero import checkpoint
from common.zero.ds_config import deepspeed_config
from common.zero.engine import build_engine

IDS = torch.randint(1, models.VOCAB, (1, 70), generator=torch.Generator().manual_seed(3))
CAUSAL = torch.ones(70, 70, dtype=torch.bool).tril()[None, None]
ROPE = "model.rotary_emb.inv_freq"
CASES = {
    # But those whose scores transformers' sdpa computes otherwise than eager attention, or whose logits are scaled.
    **{name: (name, {}) for name in models.ARCHITECTURES if name not in ("gemma2", "gpt_oss", "granite")},
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama3_rope": ("llama", {"rope_parameters": models.LLAMA3_ROPE}),
}


# ------------------------------------------------------------------ load and export, under ZeRO-3 on two ranks


def settings_of(lm, folder: Path | str, jinja: str = TULU) -> dict[str, bytes]:
    """The files of an export besides its weights, of a model of a folder."""
    folder = str(folder)
    template = ChatTemplate("bar", jinja, model.load_tokenizer(folder))
    return export.export_settings(model.load_config(folder), lm.dtype, template, folder) | export.stored_layout(lm)


def load_and_export(folders: list[str], outputs: list[str]) -> list[dict]:
    """On each rank: what the partitioned model holds and computes; then its export."""
    ranks = distributed.start(5)
    seen = []
    for folder, output in zip(folders, outputs, strict=True):
        if ranks.is_main:
            Path(output).mkdir()
            old = {"weight_map": {"a": "model-00001-of-99999.safetensors"}}
            (Path(output) / export.INDEX).write_text(json.dumps(old))
            for name in (*old["weight_map"].values(), "model-mine.safetensors"):
                save_file({}, Path(output) / name)
        config = SFTConfig()
        ds_config = deepspeed_config(config)
        packed = model.load_partitioned(folder, model.load_config(folder), torch.bfloat16, "sdpa", ds_config, ranks)
        engine = build_engine(packed, config, ds_config)
        rows = torch.arange(IDS.shape[1])
        with torch.no_grad():
            row = {"input_ids": IDS, "position_ids": rows[None], "target_rows": rows, "target_ids": None}
            logits = engine(**row, packed_mask=CAUSAL, packed_positions=rows)[0][None]
        parameters = list(packed.lm.parameters())
        sizes = {"held": [p.ds_tensor for p in parameters], "whole": parameters}
        sizes = {name: sum(p.numel() for p in of) for name, of in sizes.items()}
        sizes["total"] = sum(p.ds_numel for p in parameters)
        experts = {module.config._experts_implementation for module in experts_in(packed.lm)}
        seen.append({"logits": logits, "buffers": dict(packed.lm.named_buffers()), "experts": experts, **sizes})
        settings = ranks.once(lambda: settings_of(packed.lm, folder, TULU.replace("eos_token", "'|'")))
        export.export_model(packed, output, settings, ranks)
    kept = patch.object(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    with kept, pytest.raises(UserError, match=r"norm\.weight is kept"):
        of_llama = folders[[*CASES].index("llama")]
        model.load_partitioned(of_llama, model.load_config(of_llama), torch.bfloat16, "sdpa", ds_config, ranks)
    return seen


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """{case: (folder, exported folder, what each of the two ranks saw)}"""
    root = tmp_path_factory.mktemp("models")
    folders = [
        models.make_model(root / name, case[0], torch.bfloat16, shard="1GB" if "llama" in name else "9KB", **case[1])
        for name, case in CASES.items()
    ]
    outputs = [root / f"{name}-exported" for name in CASES]
    per_rank = launch.on_ranks(load_and_export, 2, list(map(str, folders)), list(map(str, outputs)))
    return {name: (folders[i], outputs[i], [seen[i] for seen in per_rank]) for i, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_partitioned_model_is_what_a_plain_load_gives(loaded, case):
    """bfloat16 logits to the bit, through transformers' own sdpa under an explicit mask; buffers to the bit, RoPE's
    in float32; and each rank holds its shards alone."""
    folder, _, seen = loaded[case]
    plain = reference.load(folder, torch.bfloat16, "sdpa")
    with torch.no_grad():
        expected = plain(input_ids=IDS, attention_mask=CAUSAL).logits
    buffers = dict(plain.named_buffers())
    is_plain_rope = torch.equal(buffers[ROPE], loaded["llama"][2][0]["buffers"][ROPE]) if ROPE in buffers else None
    assert buffers and (case != "llama3_rope" or is_plain_rope is False)
    for rank in seen:
        assert torch.equal(rank["logits"], expected)
        assert rank["buffers"].keys() == buffers.keys()
        for name, buffer in buffers.items():
            dtype = torch.float32 if "inv_freq" in name else torch.bfloat16
            assert rank["buffers"][name].dtype == buffer.dtype == dtype
            assert torch.equal(rank["buffers"][name], buffer), name
        assert rank["total"] / 2 <= rank["held"] <= rank["total"] / 2 + 40
        assert rank["whole"] < rank["total"]
        assert rank["experts"] == ({GROUPED} if case in models.WITH_EXPERTS else set())


@pytest.mark.parametrize("case", CASES)
def test_export_loads_without_a_word_ends_where_answers_do_and_holds_the_same_bits(loaded, case):
    folder, output, seen = loaded[case]
    exported = load_silently(output)
    expected = reference.load(folder, torch.bfloat16).state_dict()
    assert exported.dtype == torch.bfloat16
    assert exported.state_dict().keys() == expected.keys()
    assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in expected.items())
    tied = AutoConfig.from_pretrained(folder).tie_word_embeddings
    assert (exported.get_input_embeddings().weight is exported.get_output_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(exported(input_ids=IDS, attention_mask=CAUSAL).logits, seen[0]["logits"])
    ends = [0, AutoTokenizer.from_pretrained(output).convert_tokens_to_ids("|")]  # EOS, and what closes an answer
    for name in ("generation_config.json", "config.json"):
        assert json.loads((output / name).read_text())["eos_token_id"] == ends
    assert not list(output.glob(".*")), "leftovers"


@pytest.mark.parametrize("case", CASES)
def test_export_has_each_tensor_in_the_file_and_by_the_name_of_the_folder_that_it_was_loaded_from(loaded, case):
    """And nothing of the model that was there before, but what was none of its files."""
    folder, output, _ = loaded[case]
    (output / "model-mine.safetensors").rename(output / "mine")
    stored = [
        {
            path.name: {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path).items()}
            for path in place.glob("*.safetensors")
        }
        for place in (folder, output)
    ]
    assert stored[0] == stored[1] and len(stored[0]) in (1, *range(3, 99))
    indices = [place / "model.safetensors.index.json" for place in (folder, output)]
    assert indices[0].is_file() == indices[1].is_file() == (len(stored[0]) > 1)
    if indices[1].is_file():
        theirs, ours = (json.loads(index.read_text()) for index in indices)
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def load_silently(folder):
    """from_pretrained with nothing to say: no warning, no log record, no key missing, left over or of another shape."""
    handler, logger = logging.handlers.BufferingHandler(1000), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer if record.levelno >= logging.WARNING] == []
    assert {name: list(found) for name, found in info.items() if found} == {}
    return loaded.eval()


@pytest.mark.parametrize("sizes", [("9KB", "8KB"), ("9KB", "1GB"), ("1GB", "9KB"), ("1GB", "1GB")])
def test_a_crash_in_an_export_leaves_no_model_or_the_whole_new_one(tmp_path, sizes):
    """Over the model of another run, in as many files or in one, at each change to the disk in turn."""
    folders = [models.make_model(tmp_path / str(seed), seed=seed, shard=sizes[seed]) for seed in (0, 1)]
    old, new = (PackedModel(read(folder, model.load_config(str(folder)))) for folder in folders)
    expected, output, is_whole = new.lm.state_dict(), tmp_path / "output", []
    output.mkdir()
    settings = [settings_of(of.lm, folder) for of, folder in zip((old, new), folders, strict=True)]
    export.export_model(old, str(output), settings[0], models.OneRank())
    before = shutil.copytree(output, tmp_path / "before")
    for n in itertools.count(1):
        shutil.rmtree(output)
        shutil.copytree(before, output)
        with Disk(pytest.MonkeyPatch(), [export, files], n) as disk, contextlib.suppress(Crash):
            export.export_model(new, str(output), settings[1], models.OneRank())
        is_whole.append(_holds_model(output))
        if is_whole[-1]:
            stored = load_silently(output).state_dict()
            is_new = torch.equal(stored["lm_head.weight"], expected["lm_head.weight"])
            assert not (is_new and [*output.glob(".export/*")]), "its other files are not there"
            kept = expected if is_new else old.lm.state_dict()
            assert all(torch.equal(kept[name], stored[name]) for name in kept), n
            is_whole[-1] = "new" if is_new else "old"
        if disk.count < n:
            break
    assert [name for name, _ in itertools.groupby(is_whole)] == ["old", False, "new"]


def checkpoint_of(lm, settings: dict[str, bytes], path: Path) -> Path:
    """What of a run's checkpoint an export reads, of one rank."""
    (path / "settings").mkdir(parents=True)
    small = {"state.json": b"{}"} | {f"settings/{name}": data for name, data in settings.items()}
    files = {name: write_file(path / name, [data]) for name, data in small.items()}
    for i, (name, param) in enumerate(lm.named_parameters()):
        file = f"rank_00000_of_00001.master_{i:03d}.safetensors"
        files[file] = checkpoint._write_tensors(path / file, {f"master/{name}": param.detach().flatten()})
    shapes = {name: [*param.shape] for name, param in lm.named_parameters()}
    text = json.dumps({"world_size": 1, "files": files, "parameters": shapes})
    (path / "COMPLETE").write_text(write_file(path / "manifest.json", [text.encode()])["digest"])
    return path


def memory_of_exports(folders: list[Path], root: Path) -> list[float]:
    """The most host memory, in bytes above what was there before, of a run's export and of one of its checkpoint. The
    first folder, of a small model, is exported before: what is imported and kept does not count."""
    for i, folder in enumerate(folders):
        lm = read(folder, model.load_config(str(folder)))
        settings = settings_of(lm, folder)
        path, above = checkpoint_of(lm, settings, root / f"checkpoint {i}"), []  # which reads every weight
        for write in (
            lambda to: export.export_model(PackedModel(lm), str(to), settings, models.OneRank()),
            lambda to: verbs_export.main(str(path), str(to)),
        ):
            (to := root / f"{i} {len(above)}").mkdir()
            before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
            write(to)
            above.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
            shutil.rmtree(to)
    return above


def test_export_of_a_checkpoint_takes_the_host_memory_of_one_of_its_files(tmp_path):
    """`bash run.sh export`, read from disk: 1.5 of five files, with its buffers, which do not grow. A run's: of two."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 14}
    folders = [models.make_model(tmp_path / "small"), models.make_model(tmp_path / "large", shard="100MB", **sizes)]
    files = [path.stat().st_size for path in folders[1].glob("*.safetensors")]
    assert len(files) > 4 and sum(files) > 3.5 * max(files)
    (above,) = launch.on_ranks(memory_of_exports, 1, folders, tmp_path)
    assert above[0] < 2 * max(files) and above[1] < 1.5 * max(files), (above, files)


# ------------------------------------------------------------------ weights that are refused


def read(folder: Path, config):
    """What rank 0 reads."""
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config)
    expected.tie_weights()
    return model._from_folder(str(folder), config, {"dtype": torch.float32, **model.NO_CODE}, expected)


def changed(path: Path, tensors: dict) -> None:
    save_file({**load_file(path), **tensors}, path)


def rewritten(file: Path, index: str) -> None:
    """The file under another name, and an index in its place."""
    file.rename(file.with_name("other.safetensors"))
    file.with_name("model.safetensors.index.json").write_text(index)


def configured(file: Path, **changes) -> None:
    models.make_config(tie_word_embeddings=True, **changes).save_pretrained(file.parent)


TIED = models.make_config(tie_word_embeddings=True)
UP = "model.layers.2.mlp.up_proj.weight"
INDEX = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "model-2.safetensors"}})
# what is wrong -> (what is done to model.safetensors of TIED or beside it, what is named)
DAMAGE = {
    "torn": (lambda file: file.write_bytes(file.read_bytes()[:-100]), ""),
    "absent": (lambda file: file.unlink(), "model.safetensors"),
    "pickled": (lambda file: torch.save({}, file.rename(file.with_name("pytorch_model.bin"))), "safetensors"),
    "file of the index absent": (lambda file: rewritten(file, INDEX), "model-2.safetensors"),
    "index torn": (lambda file: rewritten(file, "{"), ""),
    "tensor left over": (lambda file: changed(file, {UP: torch.zeros(48, 32)}), UP),
    "tied, but different": (lambda file: changed(file, {"lm_head.weight": torch.zeros(models.VOCAB, 32)}), "lm_head"),
    "more layers": (lambda file: configured(file, num_hidden_layers=3), "model.layers.2."),
    "wider layers": (lambda file: configured(file, intermediate_size=64), "model.layers.0.mlp.down_proj.weight"),
    **{
        str(dtype): (lambda file, dtype=dtype: changed(file, {"model.norm.weight": torch.ones(32).to(dtype)}), name)
        for dtype, name in ((torch.int8, "norm.weight is stored as I8"), (torch.float8_e4m3fn, "stored as F8_E4M3"))
    },
}


@pytest.mark.parametrize("wrong", DAMAGE)
def test_weights_that_are_not_whole_or_not_the_configs_are_refused_by_name(tmp_path, wrong, capfd):
    damage, named = DAMAGE[wrong]
    folder = models.make_model(tmp_path / "model", tie_word_embeddings=True)
    capfd.readouterr()
    damage(folder / "model.safetensors")
    with models.refused(*map(re.escape, (str(folder), named))):
        read(folder, model.load_config(str(folder)))
    assert capfd.readouterr().err == "", "a report besides the one line"


def test_weights_in_four_bits_are_read_as_what_they_stand_for_and_exported_so(tmp_path):
    """MXFP4, as gpt-oss's experts are stored: pairs of numbers of four bits, and an exponent for each 32 of them."""
    folder = models.make_model(tmp_path / "model", "gpt_oss", hidden_size=64, intermediate_size=32)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values, generator = torch.cat([values, -values]), torch.Generator().manual_seed(0)
    stored, expected = load_file(folder / "model.safetensors"), {}
    packed = {name for name in stored if name.endswith("_proj")}
    for name in packed:
        num_experts, inputs, outputs = stored.pop(name).shape
        shape = (num_experts, outputs, inputs // 32)
        codes = torch.randint(0, 16, (*shape, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": codes[..., ::2] | codes[..., 1::2] << 4, f"{name}_scales": scales}
        numbers = values[codes.long()] * 2.0 ** (scales.float() - 127)[..., None]
        expected[name] = numbers.flatten(2).transpose(1, 2)
    files = {name: f"model-0000{1 + ('layers.0.' in name)}-of-00002.safetensors" for name in stored}
    for file in {*files.values()}:
        save_file({name: stored[name] for name in stored if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / export.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(settings))
    config = model.load_config(str(folder))
    model.check_supported(config, 60, 1)
    lm = read(folder, config)
    for name, param in lm.named_parameters():
        assert torch.equal(param, expected[name] if name in packed else stored[name]), name
    exported = settings_of(lm, folder)
    assert "quantization_config" not in json.loads(exported["config.json"])
    places = json.loads(exported[export.INDEX])["weight_map"]
    assert len(packed) == 4 and all(places[name] == files[f"{name}_blocks"] for name in packed)
    assert {*places} == {*dict(lm.named_parameters())}


def test_what_is_left_over_but_harmless_is_read_and_so_are_files_in_a_folder_of_their_own(tmp_path):
    folder = models.make_model(tmp_path / "model", tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    copy = tensors["model.embed_tokens.weight"].clone()
    changed(file, {"lm_head.weight": copy, "model.rotary_emb.inv_freq": torch.ones(4)})
    assert len(dict(read(folder, TIED).named_parameters())) == len(tensors)
    (folder / "weights").mkdir()
    file.rename(folder / "weights" / "all.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys([*tensors, "lm_head.weight"], "weights/all.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, param in read(folder, TIED).named_parameters():
        assert torch.equal(param, tensors[name]), name


@pytest.mark.parametrize("model_type", ["llama", "no_such_type"])
def test_code_in_a_folder_never_runs_and_nobody_is_asked(tmp_path, monkeypatch, model_type):
    """Though somebody would say yes. With a model type that transformers knows its own code is used."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    folder, ran, is_known = models.make_model(tmp_path / "model"), tmp_path / "ran", model_type == "llama"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", "code.T"]}
    of_tokenizer = {} if is_known else {"tokenizer_class": "NoSuchTokenizer"}
    for name, own in (("config.json", {"model_type": model_type}), ("tokenizer_config.json", of_tokenizer)):
        values = json.loads((folder / name).read_text()) | {"auto_map": auto_map} | own
        (folder / name).write_text(json.dumps(values))
    for load in (model.load_config, model.load_tokenizer):
        with contextlib.nullcontext() if is_known else pytest.raises(UserError, match="model"):
            load(str(folder))
    if is_known:
        model.parameter_sizes(model.load_config(str(folder)))
        read(folder, model.load_config(str(folder)))
    assert not ran.exists()


# ------------------------------------------------------------------ models and folders that are refused


config_of = AutoConfig.for_model
NEEDS = {"gemma2": {WINDOWS, SOFT_CAP}, "gpt_oss": {WINDOWS, SINKS}}
WINDOW_OF_SOME = dict(use_sliding_window=True, sliding_window=50, layer_types=["full_attention", "sliding_attention"])
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
ROPES = {"sliding_attention": models.ROPE, "full_attention": LONG_ROPE | {"original_max_position_embeddings": 64}}
POSITIONS = dict(n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
REFUSED = {
    "noise in the router": (lambda: config_of("phimoe"), "router_jitter_noise"),
    "dropout": (lambda: models.make_config(attention_dropout=0.1), "attention_dropout"),
    "positions, GPT-2": (lambda: config_of("gpt2", **POSITIONS), "64 positions, the longest sample 100 tokens"),
    "state, RWKV": (lambda: config_of("rwkv"), "rwkv"),
    "layers of a type that is not known": (lambda: config_of("deepseek_v32"), "indexed_attention"),
    "a soft cap by another name": (lambda: config_of("recurrent_gemma"), "logits_soft_cap"),
    "chunks": (lambda: config_of("llama4_text"), "llama4"),
    "encoder": (lambda: config_of("t5"), "not a causal language model"),
    "several decoders": (lambda: config_of("musicgen"), "musicgen"),
    "ALiBi": (lambda: config_of("bloom", hidden_dropout=0.0, attention_dropout=0.0), "bloom"),
    "dynamic RoPE": (lambda: models.make_config(max_position_embeddings=64, rope_parameters=DYNAMIC_ROPE), "RoPE"),
    "RoPE of some layers": (lambda: config_of("gemma3_text", head_dim=8, rope_parameters=ROPES), "above 64"),
    "small embedding": (lambda: models.make_config(vocab_size=200), "embedding only 200 rows"),
    "quantized": (lambda: models.make_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_trained_wrongly_is_refused_by_name(name):
    make, named = REFUSED[name]
    with models.refused(named):
        model.check_supported(make(), 100, 300)


ACCEPTED = [
    *((lambda name=name: models.make_config(name), NEEDS.get(name, set())) for name in models.ARCHITECTURES),
    (lambda: models.make_config("mistral", sliding_window=99), {WINDOWS}),
    (lambda: models.make_config("mistral", sliding_window=100), set()),  # as long as the longest sample
    (lambda: models.make_config("qwen2", use_sliding_window=False, sliding_window=50), set()),
    (lambda: models.make_config("qwen2", **WINDOW_OF_SOME), {WINDOWS}),
    (lambda: models.make_config(rope_parameters=models.LLAMA3_ROPE), set()),
    (lambda: config_of("nemotron_h", max_position_embeddings=64), set()),  # which has no positions
    (lambda: config_of("cohere", logit_scale=0.0625, num_hidden_layers=1), set()),
    (lambda: config_of("gpt2", **POSITIONS | {"n_positions": 100}), set()),
    (lambda: models.make_config(vocab_size=300), set()),
]


@pytest.mark.parametrize(("make", "needs"), ACCEPTED)
def test_what_can_be_trained_is_accepted_with_what_its_attention_needs(make, needs):
    config = make()
    model.check_supported(config, 100, 300)
    assert model.attention_needs(config, 100) == needs


def test_auto_compiles_layers_on_a_gpu_but_for_those_with_a_state():
    dense = models.make_config()
    assert model.compiles_layers("auto", "cuda", dense) and not model.compiles_layers("auto", "cpu", dense)
    assert model.compiles_layers(True, "cpu", dense) and not model.compiles_layers(False, "cuda", dense)
    assert model.compiles_layers("auto", "cuda", models.make_config("qwen3_moe"))
    config = config_of("lfm2", layer_types=["conv", "full_attention"], num_hidden_layers=2)
    assert not model.compiles_layers("auto", "cuda", config) and model.compiles_layers(True, "cuda", config)
    assert not model.compiles_layers("auto", "cuda", config_of("gemma3n_text"))  # whose layers clamp their weights


def test_flops_of_attention_are_those_of_the_layers_that_have_some():
    of = {name: flops_per_token(10, models.make_config(name), 100) for name in ("llama", "qwen3_next", "gemma2")}
    assert of == {"llama": 60 + 6 * 32 * 200, "qwen3_next": 60 + 6 * 32 * 100, "gemma2": 60 + 6 * 32 * 132}
    assert flops_per_token(10, config_of("mamba2"), 100) == 60


def test_models_that_cannot_be_built_or_have_no_layers_of_their_own_are_refused_by_name():
    shared = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
    cases = [(config_of("zamba2", **shared), "model type zamba2 has layers that share parameters")]
    cases += [(config_of("hrm_text"), "model type hrm_text is not supported")]
    for config, named in [*cases, (models.make_config(hidden_act="no_such_function"), "transformers cannot build it")]:
        with models.refused(named):
            model.parameter_sizes(config)


UNUSABLE = {"config.json": [None, "{", "{}", '{"model_type": "no_such_type"}', "[]"]}
UNUSABLE["generation_config.json"] = ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [[1], 2]}']


@pytest.mark.parametrize(("name", "text"), [(name, text) for name in UNUSABLE for text in UNUSABLE[name]])
def test_a_config_or_generation_config_that_cannot_be_used_is_refused_by_name(tmp_path, name, text):
    models.make_config().save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{tmp_path}: {name} cannot be"):
        model.load_config(str(tmp_path))


def test_models_that_are_not_there_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c", "nobody/nothing"):
        with models.refused("no such folder", re.escape(name)):
            model.find_model(name)
    with pytest.raises(UserError, match="--model_revision main"):
        model.find_model(str(models.make_model(tmp_path)), "main")


# ------------------------------------------------------------------ tokenizers, and what is built


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{"}, None])
def test_a_folder_without_a_tokenizer_that_can_end_answers_is_refused(tmp_path, files):
    if files is None:
        tokenizer = models.make_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path)
    for name, text in (files or {}).items():
        (tmp_path / name).write_text(text)
    with models.refused("eos_token" if files is None else "tokenizer", re.escape(str(tmp_path))):
        model.load_tokenizer(str(tmp_path))


WRITTEN = [("qwen2", "PreTrainedTokenizerFast"), ("llama", "GPT2Tokenizer"), ("llama", "LlamaTokenizer")]


@pytest.mark.parametrize("model_type, written", WRITTEN)
@pytest.mark.parametrize("words", ["llama3", "gpt2"])
def test_a_tokenizer_encodes_as_its_file_does(tmp_path, model_type, written, words):
    """transformers rebuilds the tokenizer of some classes and model types with their own way of splitting words."""
    tiny_tokenizer.tiny_tokenizer(words).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": written}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "".join(tiny_tokenizer.TEXTS) + "It's 123456 o'clock  \n\n 'LL\n"
    tokenizer = model.load_tokenizer(str(tmp_path))
    assert tokenizer.encode(text, add_special_tokens=False) == file.encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token_id is not None


@pytest.mark.parametrize("settings", [{"do_sample": False, "temperature": 0.5}, {"do_sample": False, "top_p": 0.9}, {}])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_what_could_not_be_exported_after_training_is_refused_before_it(tmp_path, model_type, settings):
    """A tokenizer that is used as it is alone in its folder is rebuilt by transformers beside a Qwen2's config.json."""
    models.make_config(model_type).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    tiny_tokenizer.tiny_tokenizer("llama3").save_pretrained(tmp_path / "tokenizer")
    template, folder = resolve_template("tulu", model.load_tokenizer(str(tmp_path / "tokenizer"))), tmp_path / "model"
    given = model.load_config(str(folder)), torch.float32, template, str(folder)
    if not settings and model_type == "llama":
        assert "config.json" in export.export_settings(*given)
        return
    with models.refused("cannot be written" if settings else "read back", re.escape(str(folder))):
        export.export_settings(*given)


def test_what_surprises_a_models_user_is_said_and_nothing_else(tmp_path):
    """Each thing alone, then none."""

    def said(jinja: str, own: str | None = None, longest: int = 8, adds_bos: bool = False) -> list[str]:
        tokenizer = tiny_tokenizer.tiny_tokenizer(chat_template=own)
        if adds_bos:
            special = [("<bos>", tokenizer.bos_token_id)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", "<bos> $A $B", special)
        (tmp_path / "chat.jinja").write_text(jinja)
        template = resolve_template(str(tmp_path / "chat.jinja"), tokenizer)
        return model.warnings(template, models.make_config(max_position_embeddings=64), longest)

    chatml, llama3 = tiny_tokenizer.CHATML, tiny_tokenizer.LLAMA3
    assert said(chatml) == said(chatml, own=chatml) == said(llama3, adds_bos=True) == said(chatml, longest=64) == []
    for lines, named in [
        (said(chatml, own=llama3), "the tokenizer's own"),
        (said(chatml, adds_bos=True), "<bos>"),
        (said(chatml.replace("<|im_end|>", "</answer>")), "answer"),
        (said(chatml, longest=65), "65 tokens"),
    ]:
        assert len(lines) == 1 and named in lines[0] and "chat.jinja" in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash_attention_2", "flash_attention_4"])
def test_a_class_that_transformers_does_not_run_on_its_sdpa_is_built_with_ours(kernel):
    config = config_of("gemma2", num_hidden_layers=1)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, attn_implementation=registered_name(kernel))
    assert not built._supports_sdpa and built.config._attn_implementation == registered_name(kernel)


def test_what_auto_made_of_the_layers_is_recorded():
    policy = packed.PackedModel(AutoModelForCausalLM.from_config(models.make_config(num_hidden_layers=3)))
    policy.checkpoint_activations(2)
    assert policy.layers_report() == {"number": 3, "recomputed": 2, "compiled": False}
    policy.compile_layers()
    assert policy.layers_report() == {"number": 3, "recomputed": 2, "compiled": True}
