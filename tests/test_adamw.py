"""One pass of AdamW over masters and moments, and their rounding: pytest tests/test_adamw.py"""

import pytest
import torch

from common.zero.adamw import adamw_

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SIZES = [1, 7, 1024, 5001]  # a lone element, one block, and blocks that a stretch does not fill


def by_definition(masters, gradients, options, factor) -> list[torch.Tensor]:
    """torch's AdamW in float64, after len(gradients) steps."""
    params = [torch.nn.Parameter(master.double()) for master in masters]
    optimizer = torch.optim.AdamW(params, **options)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = gradient.double() * factor
        optimizer.step()
    return [param.detach() for param in params]


def check(device: str, options: dict, factor: float, dtype: torch.dtype | None) -> None:
    """Three steps on stretches of flat tensors, which start where the last one ended."""
    torch.manual_seed(0)
    flat = [torch.randn(sum(SIZES)), torch.zeros(sum(SIZES)), torch.zeros(sum(SIZES))]
    masters, exp_avgs, exp_avg_sqs = (list(t.to(device).split(SIZES)) for t in flat)
    parts = None if dtype is None else [torch.full((n,), 7.0, dtype=dtype, device=device) for n in SIZES]
    gradients = [[torch.randn(n) * 10.0 ** torch.randint(-6, 2, (n,)) for n in SIZES] for _ in range(3)]
    expected = by_definition([m.cpu() for m in masters], gradients, options, factor)
    for step, of_step in enumerate(gradients):
        adamw_(masters, [g.to(device) for g in of_step], exp_avgs, exp_avg_sqs, parts, step + 1, factor, options)
    for i, master in enumerate(expected):
        torch.testing.assert_close(masters[i].cpu(), master.float(), rtol=1e-6, atol=1e-6)
        if parts is not None:
            assert torch.equal(parts[i], masters[i].to(dtype))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("changes", [{}, {"weight_decay": 0.0}, {"betas": (0.0, 0.5)}, {"lr": 0.0}], ids=str)
def test_three_steps_are_torchs_in_float64_and_parts_are_the_masters_rounded(changes, factor, dtype):
    check("cpu", OPTIONS | changes, factor, dtype)
