"""The independent reference: plain transformers and torch, one process, one sample at a time.

It shares no code with the product. What both must agree on is written here a second time, from the contract
and the papers.
"""

import math
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, get_scheduler

# ------------------------------------------------------------------ tokens


def render_tulu(messages: list[dict], eos: str) -> tuple[str, list[tuple[int, int]]]:
    """The tulu template by hand, and the characters [start, end) of each assistant turn, EOS included."""
    text, spans = "", []
    for i, message in enumerate(messages):
        text += f"<|{message['role']}|>\n"
        if message["role"] == "assistant":
            start = len(text)
            text += message["content"] + eos
            spans.append((start, len(text)))
            text += "" if i == len(messages) - 1 else "\n"
        else:
            text += message["content"] + "\n"
    return text, spans


def conversation_tokens(tokenizer, messages: list[dict], max_length: int = 10**6) -> tuple[list[int], list[int]]:
    """(ids, positions of the targets)."""
    text, spans = render_tulu(messages, tokenizer.eos_token)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    targets = [t for t, (start, _) in enumerate(encoded.offset_mapping) if any(a <= start < b for a, b in spans)]
    return encoded.input_ids[:max_length], [t for t in targets if 0 < t < max_length]


def pair_tokens(tokenizer, row: dict, max_length: int = 10**6):
    """(chosen, rejected), each as conversation_tokens, with the last answer's targets alone; None if there are none."""
    sides = []
    for side in ("chosen", "rejected"):
        ids, _ = conversation_tokens(tokenizer, row[side])
        prompt, _ = render_tulu(row[side][:-1], tokenizer.eos_token)
        if row[side][-2]["role"] == "assistant":
            prompt += "\n"
        prompt_ids = tokenizer(prompt + "<|assistant|>\n", add_special_tokens=False).input_ids
        assert ids[: len(prompt_ids)] == prompt_ids
        ids = ids[:max_length]
        sides.append((ids, list(range(len(prompt_ids), len(ids)))))
    return tuple(sides) if all(targets for _, targets in sides) else None


def load(folder, dtype=torch.float32, attention: str = "eager"):
    has_images = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation=attention)


def load_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def token_logps(model, ids: list[int], targets: list[int]) -> torch.Tensor:
    """log p of the tokens at `targets`, from the whole sequence's logits."""
    return logps_and_balance(model, ids, targets, 0)[0]


def logps_and_balance(model, ids: list[int], targets: list[int], router_aux_loss_coef: float):
    """token_logps, and transformers' own loss of the routers on this sequence, times its coefficient."""
    more = {"output_router_logits": True} if router_aux_loss_coef else {}
    output = model(input_ids=torch.tensor([ids]), use_cache=False, **more)
    logits, balance = output.logits[0], router_aux_loss_coef * output.aux_loss if more else torch.zeros(())
    logps = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return logps[[t - 1 for t in targets], [ids[t] for t in targets]], balance


# ------------------------------------------------------------------ training


def train(
    model,
    num_samples: int,
    backward: Callable,
    *,
    global_batch_size: int,
    num_steps: int,
    steps_run: int | None = None,
    learning_rate: float = 1e-3,
    lr_scheduler_type: str = "linear",
    warmup_ratio: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    seed: int = 42,
) -> list[dict]:
    """Trains in place. backward(model, samples) adds the step's gradient and returns what the step reports."""
    options = {"betas": (adam_beta1, adam_beta2), "eps": adam_epsilon, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, **options)
    scheduler = get_scheduler(lr_scheduler_type, optimizer, int(num_steps * warmup_ratio), num_steps)
    records, order, epoch, seen = [], [], -1, 0
    for step in range(steps_run or num_steps):
        if not order:
            epoch += 1
            order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        samples, order = order[:global_batch_size], order[global_batch_size:]
        seen += len(samples)
        record = backward(model, samples)
        trained = [p for p in model.parameters() if p.grad is not None]  # of text
        norm = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in trained))
        if max_grad_norm and norm > max_grad_norm:
            for p in trained:
                p.grad.mul_(max_grad_norm / (norm + 1e-6))
        own = {"step": step + 1, "learning_rate": scheduler.get_last_lr()[0], "grad_norm": norm}
        records.append(own | {"samples": seen, "epoch": seen / num_samples, **record})
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return records


def train_sft(
    model, samples: list[tuple[list[int], list[int]]], router_aux_loss_coef: float = 0.0, **settings
) -> list[dict]:
    """samples: (ids, positions of the targets)."""

    def backward(model, chosen):
        num_targets = sum(len(samples[i][1]) for i in chosen)
        total = balances = 0.0
        for i in chosen:
            logps, balance = logps_and_balance(model, *samples[i], router_aux_loss_coef)
            (-logps.sum() / num_targets + balance / len(chosen)).backward()
            total -= logps.sum().item()
            balances += balance.item() / len(chosen)
        more = {"router_aux_loss": balances} if router_aux_loss_coef else {}
        return {"train_loss": total / num_targets, "target_tokens": num_targets, **more}

    return train(model, len(samples), backward, **settings)


def preference_loss(
    name: str, chosen, rejected, beta: float, label_smoothing: float = 0.0, gamma_beta_ratio: float = 0.0
):
    """Of one pair. chosen, rejected: log-ratios to the reference (simpo: log-probabilities); means but for sigmoid."""

    def minus_log_sigmoid(x):
        return torch.log1p(torch.exp(-x)) if x > 0 else torch.log1p(torch.exp(x)) - x

    difference = chosen - rejected
    if name == "ipo":
        return (difference - 0.5 / beta) ** 2
    if name == "simpo":
        return minus_log_sigmoid(beta * difference - gamma_beta_ratio * beta)
    x, e = beta * difference, label_smoothing
    return (1 - e) * minus_log_sigmoid(x) + e * minus_log_sigmoid(-x)


def train_dpo(
    model,
    pairs: list,
    loss_type: str,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.3,
    reference_model=None,
    router_aux_loss_coef: float = 0.0,
    **settings,
) -> list[dict]:
    """pairs: as pair_tokens. The reference is the model as given, unless there is another."""

    def side_logp(model, side, coefficient=0.0):
        logps, balance = logps_and_balance(model, *side, coefficient)
        return logps.sum() if loss_type == "sigmoid" else logps.mean(), balance

    with torch.no_grad():
        start = reference_model or model
        reference = [[side_logp(start, side)[0].item() * (loss_type != "simpo") for side in pair] for pair in pairs]

    def backward(model, chosen_pairs):
        names = ["train_loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "margin", "accuracy"))]
        names += ["logps/chosen", "logps/rejected"]
        sums, balance_of_step = dict.fromkeys(names, 0.0), 0.0
        for i in chosen_pairs:
            logps, balances = zip(*(side_logp(model, side, router_aux_loss_coef) for side in pairs[i]), strict=True)
            balance = sum(balances) / 2 / len(chosen_pairs)
            ratios = [logp - ref for logp, ref in zip(logps, reference[i], strict=True)]
            loss = preference_loss(loss_type, *ratios, beta, label_smoothing, gamma_beta_ratio)
            (loss / len(chosen_pairs) + balance).backward()
            balance_of_step += balance.item()
            chosen, rejected = (beta * ratio.item() for ratio in ratios)
            accuracy = 0.5 if chosen == rejected else float(chosen > rejected)
            values = (loss.item(), chosen, rejected, chosen - rejected, accuracy, logps[0].item(), logps[1].item())
            for name, value in zip(names, values, strict=True):
                sums[name] += value
        targets = sum(len(targets) for i in chosen_pairs for _, targets in pairs[i])
        more = {"router_aux_loss": balance_of_step} if router_aux_loss_coef else {}
        return {name: value / len(chosen_pairs) for name, value in sums.items()} | {"target_tokens": targets, **more}

    return train(model, len(pairs), backward, **settings)
