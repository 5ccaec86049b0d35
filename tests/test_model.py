"""The model that is trained is the model of the folder, and what is exported is what was trained.

pytest tests/test_model.py
"""

import json
import logging
import warnings
from pathlib import Path

import launch
import models
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as models_of_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from common import ranks as distributed
from common.config import SFTConfig
from common.data.chat_template import TULU, ChatTemplate
from common.failures import UserError
from common.model import export, packed
from common.model import load as model
from common.model.attention import registered_name
from common.zero.ds_config import deepspeed_config
from common.zero.engine import build_engine

IDS = torch.randint(1, models.VOCAB, (1, 70), generator=torch.Generator().manual_seed(3))
CAUSAL = torch.ones(70, 70, dtype=torch.bool).tril()[None, None]
CASES = {
    **{name: (name, {}) for name in models.ARCHITECTURES},
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "llama3_rope": ("llama", {"rope_parameters": models.LLAMA3_ROPE}),
}


# ------------------------------------------------------------------ load and export, under ZeRO-3 on two ranks


def load_and_export(folders: list[str], outputs: list[str]) -> list[dict]:
    """On each rank: what the partitioned model holds and computes; then its export, in shards of a few tensors."""
    export.SHARD_BYTES = 9000
    ranks = distributed.start(5)
    seen = []
    for folder, output in zip(folders, outputs, strict=True):
        Path(output).mkdir(exist_ok=True)
        config = SFTConfig()
        ds_config = deepspeed_config(config)
        packed = model.load_partitioned(folder, model.load_config(folder), torch.bfloat16, "sdpa", ds_config, ranks)
        engine = build_engine(packed, config, ds_config)
        rows = torch.arange(IDS.shape[1])
        with torch.no_grad():
            logits = engine(
                input_ids=IDS, position_ids=rows[None], target_rows=rows, target_ids=None, packed_mask=CAUSAL
            )[None]
        held = sum(p.ds_tensor.numel() for p in packed.lm.parameters())
        total = sum(p.ds_numel for p in packed.lm.parameters())
        seen.append(
            {
                "logits": logits,
                "buffers": dict(packed.lm.named_buffers()),
                "held": held,
                "total": total,
                "whole": sum(p.numel() for p in packed.lm.parameters()),
            }
        )
        template = ChatTemplate("bar", TULU.replace("eos_token", "'|'"), model.load_tokenizer(folder))
        export.export_model(packed, output, template, folder, ranks)
    ranks.leave()
    return seen


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """{case: (folder, exported folder, what each of the two ranks saw)}"""
    root = tmp_path_factory.mktemp("models")
    folders = [
        models.make_model(root / name, architecture, torch.bfloat16, **changes)
        for name, (architecture, changes) in CASES.items()
    ]
    outputs = [root / f"{name}-exported" for name in CASES]
    per_rank = launch.on_ranks(load_and_export, 2, list(map(str, folders)), list(map(str, outputs)))
    return {name: (folders[i], outputs[i], [seen[i] for seen in per_rank]) for i, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_partitioned_model_computes_what_a_plain_load_computes(loaded, case):
    """bfloat16 logits to the bit, through transformers' own sdpa under an explicit mask."""
    folder, _, seen = loaded[case]
    plain = reference.load(folder, torch.bfloat16, "sdpa")
    with torch.no_grad():
        expected = plain(input_ids=IDS, attention_mask=CAUSAL).logits
    for rank in seen:
        assert torch.equal(rank["logits"], expected)


@pytest.mark.parametrize("case", CASES)
def test_buffers_are_those_of_a_plain_load_and_ropes_are_float32(loaded, case):
    folder, _, seen = loaded[case]
    expected = dict(reference.load(folder, torch.bfloat16).named_buffers())
    for rank in seen:
        assert rank["buffers"].keys() == expected.keys() and expected
        for name, buffer in expected.items():
            assert (
                rank["buffers"][name].dtype == buffer.dtype == (torch.float32 if "inv_freq" in name else torch.bfloat16)
            )
            assert torch.equal(rank["buffers"][name], buffer), name


def test_llama3_rope_is_not_plain_rope(loaded):
    """Or the case above would prove nothing."""
    frequencies = [loaded[case][2][0]["buffers"]["model.rotary_emb.inv_freq"] for case in ("llama", "llama3_rope")]
    assert not torch.equal(*frequencies)


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_its_part_alone(loaded, case):
    _, _, seen = loaded[case]
    for rank in seen:
        assert rank["total"] / 2 <= rank["held"] <= rank["total"] / 2 + 40
        assert rank["whole"] < rank["total"]


@pytest.mark.parametrize("case", CASES)
def test_export_loads_without_a_word_and_holds_the_same_bits(loaded, case):
    folder, output, seen = loaded[case]
    assert len(list(output.glob("model-*.safetensors"))) > 2
    exported = load_silently(output)
    expected = reference.load(folder, torch.bfloat16).state_dict()
    assert exported.dtype == torch.bfloat16
    assert exported.state_dict().keys() == expected.keys()
    assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in expected.items())
    tied = AutoConfig.from_pretrained(folder).tie_word_embeddings
    assert (exported.get_input_embeddings().weight is exported.get_output_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(exported(input_ids=IDS, attention_mask=CAUSAL).logits, seen[0]["logits"])


def test_export_has_an_index_of_all_its_files_and_no_other(loaded):
    for _, output, _ in loaded.values():
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {path.name for path in output.glob("*.safetensors")}
        assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in all_tensors(output))
        assert not list(output.glob(".*")), "leftovers"
        tokenizer = AutoTokenizer.from_pretrained(output)
        ends = [0, tokenizer.convert_tokens_to_ids("|")]  # EOS, and what closes an answer
        assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == ends


def all_tensors(folder):
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            yield from (file.get_tensor(name) for name in file.keys())  # noqa: SIM118


def load_silently(folder):
    """from_pretrained with nothing to say: no warning, no log record, no key missing, left over or of another shape."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []
    assert {name: list(found) for name, found in info.items() if found} == {}
    return loaded.eval()


# ------------------------------------------------------------------ what is refused


def config_of(model_type, **changes):
    return AutoConfig.for_model(model_type, **changes)


REFUSED = {
    "window": (lambda: models.make_config("mistral", sliding_window=50), "sliding window of 50"),
    "window of some layers": (
        lambda: models.make_config(
            "qwen2",
            use_sliding_window=True,
            sliding_window=50,
            max_window_layers=1,
            layer_types=["full_attention", "sliding_attention"],
        ),
        "sliding window",
    ),
    "soft cap": (lambda: config_of("gemma2", sliding_window=4096), "softcap"),
    "experts": (lambda: config_of("mixtral", sliding_window=None), "experts"),
    "experts, Qwen": (lambda: config_of("qwen3_moe"), "experts"),
    "experts, DBRX": (lambda: config_of("dbrx", ffn_config={"moe_num_experts": 4}), "moe_num_experts"),
    "dropout": (lambda: models.make_config(attention_dropout=0.1), "attention_dropout"),
    "dropout, GPT-2": (lambda: config_of("gpt2"), "gpt2"),
    "logit scaling, Granite": (lambda: config_of("granite", logits_scaling=8.0), "logits_scaling"),
    "logit scaling, Cohere": (lambda: config_of("cohere", logit_scale=0.0625), "logit_scale"),
    "state, Mamba": (lambda: config_of("mamba"), "mamba"),
    "state, Jamba": (lambda: config_of("jamba"), "jamba"),
    "linear attention": (lambda: config_of("qwen3_next"), "qwen3_next"),
    "chunks": (lambda: config_of("llama4_text"), "llama4"),
    "encoder": (lambda: config_of("t5"), "not a causal language model"),
    "bert as encoder": (lambda: config_of("vit"), "not a causal language model"),
    "images": (lambda: config_of("gemma3"), "gemma3"),
    "ALiBi": (lambda: config_of("bloom", hidden_dropout=0.0, attention_dropout=0.0), "bloom"),
    "dynamic RoPE": (
        lambda: models.make_config(
            max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "RoPE",
    ),
    "small embedding": (lambda: models.make_config(vocab_size=200), "embedding only 200 rows"),
    "quantized": (lambda: models.make_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_trained_wrongly_is_refused_by_name(name):
    make, named = REFUSED[name]
    with pytest.raises(UserError, match=named) as error:
        model.check_supported(make(), 100, 100, 300)
    assert "\n" not in str(error.value)


def test_a_model_without_one_list_of_layers_is_refused_by_name():
    with pytest.raises(UserError, match="model type hrm_text is not supported: it has no list of"):
        model.parameter_counts(config_of("hrm_text"))


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_the_five_architectures_are_accepted(architecture):
    model.check_supported(models.make_config(architecture), 2048, 2048, 300)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.make_config("mistral", sliding_window=100),
        lambda: models.make_config("qwen2", use_sliding_window=False, sliding_window=50),
        lambda: models.make_config(rope_parameters=models.LLAMA3_ROPE),
        lambda: config_of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=100),
        lambda: models.make_config(vocab_size=300),
    ],
)
def test_what_changes_nothing_here_is_accepted(make):
    """A window as long as the longest sample, one that is switched off, ..."""
    model.check_supported(make(), 100, 100, 300)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    for name in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(UserError, match="no such folder") as error:
            model.find_model(name)
        assert name in str(error.value)
    with pytest.raises(UserError, match=r"no config\.json"):
        model.find_model(str(tmp_path))
    with pytest.raises(UserError, match="hub"):
        model.find_model("nobody/nothing")


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "no_such_type"}', "[]"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        model.load_config(str(tmp_path))


@pytest.mark.parametrize("damage", ["torn", "absent", "shard absent", "index torn", "tensor missing", "other shape"])
def test_weights_that_are_not_whole_are_refused_by_name(tmp_path, damage):
    folder = models.make_model(tmp_path / "model")
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shape = models.make_config()
    if damage == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "absent":
        weights.unlink()
    elif damage == "shard absent":
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-2.safetensors"}}))
    elif damage == "index torn":
        index.write_text("{")
    elif damage == "tensor missing":
        shape = models.make_config(num_hidden_layers=3)
    else:
        shape = models.make_config(intermediate_size=64)
    with pytest.raises(UserError) as error, torch.device("meta"):
        model.WeightReader(str(folder)).check(AutoModelForCausalLM.from_config(shape))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "model.layers.2.mlp.up_proj.weight",
            torch.zeros(48, 32),
            "1 tensors for which the model of config.json has no place",
        ),
        ("lm_head.weight", torch.zeros(models.VOCAB, 32), "ties lm_head.weight to model.embed_tokens.weight, but"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int8), "model.norm.weight is stored as I8"),
    ],
)
def test_weights_that_are_not_the_configs_are_refused_by_name(tmp_path, name, value, said):
    folder = models.make_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: value}, folder / "model.safetensors")
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(models.make_config(tie_word_embeddings=True))
    lm.tie_weights()
    with pytest.raises(UserError, match=said):
        model.WeightReader(str(folder)).check(lm)
    harmless = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**tensors, **harmless}, folder / "model.safetensors")
    model.WeightReader(str(folder)).check(lm)


@pytest.mark.parametrize("text", ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [[1], 2]}'])
def test_a_generation_config_that_cannot_be_written_again_is_refused_with_the_config(tmp_path, text):
    models.make_config().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config\.json cannot be used"):
        model.load_config(str(tmp_path))


def test_a_config_of_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model that transformers can build"):
        model.parameter_counts(models.make_config(hidden_act="no_such_function"))


def test_dpo_before_any_sft_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"model output/sft: there is no such folder: run train_sft.py first"):
        model.find_model("output/sft")


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="which has no revisions"):
        model.find_model(str(models.make_model(tmp_path)), "main")


def test_a_tokenizer_that_cannot_end_answers_is_refused(tmp_path):
    tokenizer = models.make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS"):
        model.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("files", [{}, {"tokenizer.json": "{"}])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        model.load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_a_window_is_compared_with_what_was_asked_for_and_positions_with_what_is_there():
    window = models.make_config("mistral", sliding_window=50)
    model.check_supported(window, 50, 50, 300)
    with pytest.raises(UserError, match="50 tokens, shorter than --max_seq_length 51"):
        model.check_supported(window, 51, 20, 300)
    positions = config_of("gpt2", n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model.check_supported(positions, 4096, 64, 300)
    with pytest.raises(UserError, match="64 positions, the longest sample 65 tokens"):
        model.check_supported(positions, 4096, 65, 300)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash_attention_2", "flash_attention_4"])
def test_a_class_that_transformers_does_not_run_on_its_sdpa_is_built_with_ours(kernel):
    config = config_of("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, num_hidden_layers=1)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, attn_implementation=registered_name(kernel))
    assert not built._supports_sdpa and built.config._attn_implementation == registered_name(kernel)


def test_what_auto_made_of_the_layers_is_recorded():
    policy = packed.PackedModel(AutoModelForCausalLM.from_config(models.make_config(num_hidden_layers=3)))
    policy.checkpoint_activations(2)
    assert policy.layers_report() == {"number": 3, "recomputed": 2, "compiled": False}
    policy.compile_layers()
    assert policy.layers_report() == {"number": 3, "recomputed": 2, "compiled": True}


def test_ids_that_a_tokenizer_leaves_out_count():
    backend = Tokenizer(models_of_tokenizers.WordLevel({"<eos>": 0, "a": 1, "b": 9}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert len(tokenizer) == 3 and model.num_token_ids(tokenizer) == 10
    with pytest.raises(UserError, match=r"embedding only 5 rows"):
        model.check_supported(models.make_config(vocab_size=5), 8, 8, model.num_token_ids(tokenizer))
