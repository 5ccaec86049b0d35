"""Every causal-LM type of the pinned transformers, built tiny and run packed: tests/every_model.py [--gpu] [TYPE ...]

Writes docs/models.md: each type with `equal` (log-probabilities and every parameter's gradient of samples packed into
one row are those of plain transformers on each sample alone), or why it is refused. Some minutes; a process a type.
With --gpu, or types, it prints alone. On a GPU packed rows are in bfloat16, by the kernel that `auto` takes there.
"""

import copy
import inspect
import multiprocessing
import re
import resource
import sys
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MOST_MEMORY, MOST_SECONDS = 4 * 2**30, 300  # bytes, of what a process allocates
ON_GPU = "--gpu" in sys.argv
LENGTHS = (40, 29, 17)  # tokens of the samples; windows below are shorter than two of them


def by_name(*pairs: tuple) -> dict:
    """{name: value} of pairs of a value and the names that have it."""
    return {name: value for value, names in pairs for name in names.split()}


# Numbers that make a config small, by name. What a type's config does not have is left out.
SMALL = by_name(
    (1, "moe_num_shared_experts n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace"),
    (2, "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_key_value_heads"),
    (2, "num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts"),
    (4, "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_experts"),
    (4, "num_local_experts n_routed_experts moe_num_experts"),
    (8, "global_head_dim head_dim kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim"),
    (8, "hidden_size_per_layer_input"),
    (16, "qk_head_dim q_lora_rank kv_lora_rank sliding_window"),
    (24, "shared_expert_intermediate_size moe_intermediate_size expert_ffn_hidden_size"),
    (32, "hidden_size d_model n_embd n_embed dim"),
    (48, "intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim n_inner"),
    (96, "vocab_size vocab_size_per_layer_input"),
    (256, "max_position_embeddings n_positions max_seq_len"),
    (None, "pad_token_id bos_token_id"),
    (0, "eos_token_id"),
)
# Of parts that see images.
SMALL_VISION = by_name(
    *((1, "depth"), (2, "num_heads"), (8, "global_head_dim"), (14, "patch_size"), (28, "image_size")),
    *((16, "embed_dim num_position_embeddings projection_dim"), (32, "out_hidden_size")),
)
SMALL_VISION |= {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]}
# Of a head of 8; what text parts of these types need besides.
SMALL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
FOUR_KEYS = {"num_key_value_heads": 4}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8}
HYBRIDS = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
COMPASS_ROPE = {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
OWN_TEXT = {
    "(qwen2_vl|qwen2_5_vl|qwen3_vl|qwen2_5_omni|paddleocr|ernie4_5_vl_moe)": {"rope_parameters": SMALL_ROPE},
    "(glm4v|glm_ocr)": {"rope_parameters": SMALL_ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "deepseek_v3": FOUR_KEYS,
    "step3p5": {"pad_token_id": 0, "sliding_window": 16},
    "dots3_note": FOUR_KEYS | {"head_dim": 16},
    "glm5_next": FOUR_KEYS | {"qk_rope_head_dim": 0, "head_dim": 0},
    "(gemma4|emu3|mllama)": {"pad_token_id": 0, "bos_token_id": 0},
    "cohere_compass": COMPASS_ROPE,
    "deepseek_ocr2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "hunyuan_vl": {"head_dim": 8, "rope_parameters": SMALL_ROPE},
}
# What a type needs besides, for its numbers to go together.
OWN = {
    **by_name(
        (FOUR_KEYS, "axk1 deepseek_v3 glm4_moe_lite longcat_flash glm5_next kimi_linear youtu"),
        ({"pad_token_id": 1}, "camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl"),
        ({"head_dim": 8}, "hunyuan_v1_dense hunyuan_v1_moe ministral"),
        ({"layer_types": ["conv", "full_attention"]}, "lfm2 lfm2_moe"),
    ),
    "dots3_note_text": OWN_TEXT["dots3_note"],
    "bailing_hybrid": FOUR_KEYS | {"num_expert_group": 1, "topk_group": 1},
    "bamba": STATE | {"attn_layer_indices": [1]},
    "falcon_h1": STATE | {"mamba_d_ssm": 64},
    "granitemoehybrid": STATE | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]}
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "moe_shared_expert_intermediate_size": 24},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "zamba": HYBRIDS | {"mamba_dt_rank": 4, "attention_head_dim": 16, "attention_hidden_size": 64},
    "zamba2": HYBRIDS,
    "cohere_compass_text": COMPASS_ROPE,
    "cwm": {"bos_token_id": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 16, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32},
    },
    "granite4_vision": {"vision_config": {"hidden_size": 64, "num_attention_heads": 2}}
    | {"deepstack_layer_map": [], "spatial_target_layers": [0], "downsample_rate": "1/2"},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0]}},
    "muse_spark": {"audio_config": {"patch_sizes": [2], "hidden_sizes": [16], "depths": [1], "num_hidden_layers": 1}},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "minicpm3": FOUR_KEYS | {"head_dim": 16},
    "modernbert-decoder": {"pad_token_id": 1, "bos_token_id": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "deepseek_v2": FOUR_KEYS | {"num_experts_per_tok": 2},
}


def small_config(model_type: str):
    """A type's config with SMALL's numbers and no dropout."""
    from transformers import AutoConfig

    own = OWN.get(model_type, {})
    parts = {name: value for name, value in own.items() if name == "text_config"}  # whose default is refused
    changes = small(AutoConfig.for_model(model_type, **parts).to_dict())
    for name, value in own.items():
        changes[name] = {**changes.get(name, {}), **value} if name.endswith("_config") else value
    return AutoConfig.for_model(model_type, **changes)


def small(values: dict, numbers: dict = SMALL) -> dict:
    """The changes that make a config small, or a part of one."""
    changes = {n: value for n, value in numbers.items() if type(values.get(n)) in (int, float) or value is None}
    changes |= {name: SMALL[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    for name, value in values.items():
        if "drop" in name and type(value) in (int, float) and "token" not in name:
            changes[name] = 0.0
        if name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            changes[name] = [*dict.fromkeys(value)][:2] if len({*value}) > 1 else value[:2]
        if name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            changes[name] = SMALL_ROPE
        if name.endswith("token_id") or name.endswith("token_index"):
            changes.setdefault(name, 0)
        if name == "per_layer_config":
            changes[name] = {}
        if name in ("text_config", "vision_config", "audio_config", "sam_config", "encoder_config") and value:
            of_type = {"model_type": value["model_type"]} if "model_type" in value else {}
            vision = SMALL | {"hidden_size": 16} | SMALL_VISION
            changes[name] = small(value, SMALL if name == "text_config" else vision) | of_type
            own = (own for kind, own in OWN_TEXT.items() if re.match(kind, value.get("model_type", "")))
            changes[name] |= next(own, {}) if name == "text_config" else {}
    return changes


def tried(model_type: str) -> str:
    """`equal`, `refused: WHY`, `differs: BY HOW MUCH` or `error: WHAT`."""
    import models
    import numpy as np
    import torch
    from test_packed import Engine
    from torch import nn

    from common.data.tokens import SFTSample
    from common.failures import UserError
    from common.model import load
    from common.model.attention import registered_name, resolve_kernel
    from common.model.experts import GROUPED
    from common.model.packed import PackedModel, model_inputs, verify_packed_model
    from common.run.metrics import flops_per_token
    from common.step.packing import pack, sft_documents

    try:
        config = small_config(model_type)
    except Exception as e:
        return f"not built: {type(e).__name__}: {e}"

    def drawn() -> nn.Module:
        torch.manual_seed(0)
        lm = load.auto_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                parameter.normal_(1.0 if parameter.ndim == 1 and "norm" in name else 0.0, 0.1)
        return lm.train()

    try:
        load.check_supported(config, max(LENGTHS), 0)
        try:
            drawn_config = copy.deepcopy(config)
            with torch.device("meta"):
                load.auto_class(config).from_config(drawn_config)
        except ImportError:
            pass  # refused below
        except Exception as e:
            return f"not built: {type(e).__name__}: {e}"
        device, dtype = (torch.device("cuda"), torch.bfloat16) if ON_GPU else (torch.device("cpu"), torch.float32)
        kernel = resolve_kernel("auto", device.type, dtype, load.attention_needs(config, max(LENGTHS)))
        numel, *_ = load.parameter_sizes(config)
        assert flops_per_token(sum(numel), config.get_text_config(), max(LENGTHS)) > 0
        policy = PackedModel(load.without_other_parts(drawn()).to(device, dtype))
        policy.decoder.set_attn_implementation(registered_name(kernel))
        policy.config._experts_implementation = GROUPED
        ranks = models.OneRank()
        ranks.device = device
        verify_packed_model(Engine(policy), kernel, ranks)
        # From here on each has its own settings.
        config = copy.deepcopy(config)
        config._attn_implementation = config._experts_implementation = "eager"
        lm = drawn().to(device)
        samples = [np.random.default_rng(n).integers(2, config.get_text_config().vocab_size, n) for n in LENGTHS]
        alone = []
        for ids in samples:
            tokens = torch.from_numpy(ids)[None].to(device)
            taken = inspect.signature(lm.forward).parameters
            types = dict.fromkeys({"token_type_ids", "mm_token_type_ids"} & taken.keys(), torch.zeros_like(tokens))
            types = {} if config.get_text_config() is config else types  # all of it is text
            logps = lm(input_ids=tokens, use_cache=False, **types).logits[0, :-1].float().log_softmax(-1)
            alone.append(logps.gather(1, tokens[0, 1:, None])[:, 0])
        alone = torch.cat(alone)
        alone.sum().backward()
        gradients = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
        row = pack([sft_documents(SFTSample(ids, np.array([[1, len(ids)]]))) for ids in samples])
        packed, _ = policy(**model_inputs(row, kernel, device))
        packed.sum().backward()
        off, errors = (packed - alone).abs(), []
        for name, p in policy.lm.named_parameters():
            expected = gradients.get(name, torch.zeros((), device=device))
            got = torch.zeros_like(expected) if p.grad is None else p.grad
            errors.append(((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item())
        if ON_GPU:  # of what bfloat16 rounds, and of tokens that it sends to other experts, no largest error tells
            figures, most = (off.mean().item(), sorted(errors)[len(errors) // 2]), (0.05, 0.3)
        else:
            figures, most = (off.max().item(), max(errors)), (1e-3, 1e-3)
        is_equal = all(figure < limit for figure, limit in zip(figures, most, strict=True))
        told = "{:.2g} in log-probabilities, {:.2g} in gradients".format(*figures)
        return f"equal, {kernel}: {told}" if ON_GPU and is_equal else "equal" if is_equal else f"differs: {told}"
    except UserError as e:
        return "refused: " + re.sub(f"model type {re.escape(model_type)}:? ", "", str(e))
    except Exception as e:
        return f"error: {type(e).__name__}: {e}"


def in_a_process(model_type: str) -> str:
    """What `tried` finds, in a process of its own: some types take more memory or time than there is."""

    def work(end) -> None:
        if not ON_GPU:  # whose driver takes addresses without end
            resource.setrlimit(resource.RLIMIT_AS, (2 * MOST_MEMORY, 2 * MOST_MEMORY))
        end.send(tried(model_type))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=[theirs])
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(MOST_SECONDS) else "error: it took too long"
    except EOFError:
        return "error: its process ended"
    finally:
        process.kill()
        process.join()


def main() -> None:
    import test_packed  # noqa: F401  (once, and not in each process)
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    torch.set_num_threads(1)
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    asked = [name for name in sys.argv[1:] if name != "--gpu"]
    types = asked or sorted(known)
    with ThreadPoolExecutor(8 if ON_GPU else 2) as pool:
        seen = dict(zip(types, pool.map(in_a_process, types), strict=True))
    results = {name: " ".join(result.split())[:200] for name, result in seen.items()}
    for name, result in results.items():
        print(f"{name:28} {result}")
    if asked or ON_GPU:
        return
    counts = Counter(result.split(":")[0] for result in results.values())
    lines = [
        "# Models",
        "",
        f"Each of the {len(results)} types of transformers {transformers.__version__} that are causal language models,",
        "or have one beside parts that see images (of these the text part is trained), built tiny with random weights",
        "and trained on three samples in one row (`python tests/every_model.py` writes this file). `equal`:",
        "log-probabilities and every parameter's gradient are those of plain transformers' eager attention on each",
        "sample alone, in float32 to 1e-3; windows are shorter than the samples. `refused`: by name, before",
        "training, by the checks that every run makes. `differs`: none of these found it. `error`: the script failed.",
        "`not built`: a small config of that type was not found. "
        + ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
        + ".",
        "",
        "Equal: " + ", ".join(f"`{name}`" for name, result in results.items() if result == "equal") + ".",
        "",
        "| type | what is seen |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {result} |" for name, result in results.items() if result != "equal"]
    (ROOT / "docs" / "models.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
