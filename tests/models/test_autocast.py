"""Two whole steps of every objective in fp32 and in bf16: what is divided by a temperature or kept stays fp32."""

import math
from contextlib import nullcontext

import pytest
import torch

from models.objectives import OBJECTIVES
from models.selection import SelectionConfig, select
from tests.models.objective_cases import CONFIGS, built, crops_for

LAGGING = [name for name in OBJECTIVES if name in ("moby", "moco_v3", "byol", "dino", "ibot")]
SCORED = [(name, "online") for name in CONFIGS] + [(name, "target") for name in LAGGING]


@pytest.mark.parametrize("rule", ["hardest", "random"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "encoder"), SCORED)
def test_two_steps_lose_and_remember_in_fp32(name, encoder, precision, rule):
    torch.manual_seed(0)
    objective, crops = built(name), crops_for(name, batch=8)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    selection = SelectionConfig(rule=rule, encoder=encoder, precision="same" if precision == "fp32" else "bf16")
    pairs = math.comb(crops[0].shape[1], 2)
    before = {key: value.clone() for key, value in objective.named_buffers()}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            scores = objective.pair_losses(crops, selection) if rule == "hardest" else None
            table_BP = torch.zeros(8, pairs) if scores is None else scores.losses_BP
            choice_B = select(table_BP, rule) if scores is not None else torch.randint(pairs, (8,))
            loss, metrics = objective.loss(objective.take(crops, choice_B, scores))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert table_BP.dtype == torch.float32 and table_BP.isfinite().all()
        assert all(value.dtype == torch.float32 and value.isfinite() for value in metrics.values())
    for key, value in {**dict(objective.named_parameters()), **dict(objective.named_buffers())}.items():
        if value.is_floating_point():
            assert value.dtype == torch.float32 and value.isfinite().all(), key
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in objective.parameters())
    moved = [key for key in before if ("centre" in key or "rows" in key)]
    assert all(not torch.equal(before[key], objective.get_buffer(key)) for key in moved)
