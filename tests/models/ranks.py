"""One rank of a world: a MoBY step on its share of a batch.

Run as `ranks.py RANK WORLD FOLDER`; writes FOLDER/RANK.pt.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from models.backbones import BackboneConfig
from models.distributed import gather, gather_with_gradient, world_size
from models.negatives import NONE
from models.objectives import Length, build_objective
from models.objectives.moby import MoBY, MoBYConfig
from models.selection import SelectionConfig, select

BATCH = 8
BACKBONE = BackboneConfig("vit_tiny_patch16_224", 16, patch_size=8, width=16, depth=1, heads=2, batchnorm_mlp=True)


def share(rows: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    size = len(rows) // world
    return rows[rank * size : (rank + 1) * size]


def step(rank: int, world: int) -> dict[str, object]:
    """Pair losses, choices, averaged gradients and the state after the step."""
    torch.manual_seed(0)
    objective = build_objective(
        MoBYConfig(NONE, queue=20, hidden=16, width=8), replace(BACKBONE), Length(10, 5)
    ).train()
    assert isinstance(objective, MoBY)
    crops = share(torch.randn(BATCH, 4, 3, 16, 16), rank, world)
    labels = share(torch.arange(BATCH), rank, world)
    scores = objective.pair_losses((crops,), SelectionConfig())
    choice = select(scores.losses_BP, "hardest")
    loss, _ = objective.loss(objective.take((crops,), choice, scores), labels)
    loss.backward()
    learned = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    for gradient in learned.values():
        gradient.copy_(average(gradient))
    objective.after_step()
    buffers = dict(objective.named_buffers())
    return {
        "losses": scores.losses_BP,
        "choice": choice,
        "loss": average(loss.detach()),
        "gradients": learned,
        "buffers": buffers,
        "contrastive": in_batch_gradients(rank, world),
    }


def in_batch_gradients(rank: int, world: int) -> torch.Tensor:
    """Averaged gradient of a weight whose outputs are contrasted over all ranks."""
    torch.manual_seed(1)
    rows, weight = torch.randn(BATCH, 5), torch.randn(5, 4, requires_grad=True)
    mine = share(rows, rank, world) @ weight
    everyone = gather_with_gradient(mine)
    logits = mine @ everyone.T
    own = torch.arange(len(mine)) + rank * len(mine)
    torch.nn.functional.cross_entropy(logits, own).backward()
    assert weight.grad is not None
    return average(weight.grad)


def average(value: torch.Tensor) -> torch.Tensor:
    """What DistributedDataParallel does to gradients."""
    return gather(value[None]).mean(0) if world_size() > 1 else value


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(step(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()
