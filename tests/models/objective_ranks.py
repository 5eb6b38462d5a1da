"""One rank of a world: scoring and one loss of every objective on its share of a batch.

Run as `objective_ranks.py RANK WORLD FOLDER`; writes FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from models.distributed import gather, world_size
from models.probes import matching_probabilities, task_statistics
from models.selection import SelectionConfig, select
from tests.models.objective_cases import built, crops_for

BATCH = 8
# iBOT without masks, which every rank draws for itself.
FIELDS = {"ibot": {"mask_probability": 0.0}, "moby": {"queue": 20}}
# Every objective, and behind a slash what scores pairs where it is not the usual.
SCORED = {
    "/target": SelectionConfig(encoder="target"),
    "/target early": SelectionConfig(encoder="target", layer=1),
}
OBJECTIVES = ("moby", "moco_v3", "simclr", "simsiam", "byol", "swav", "dino", "ibot")
LAGGING = ("moby/target", "moby/target early", "moco_v3/target early", "byol/target", "dino/target", "ibot/target")
NAMES = (*OBJECTIVES, *LAGGING)


def share(rows: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    size = len(rows) // world
    return rows[rank * size : (rank + 1) * size]


def average(value: torch.Tensor) -> torch.Tensor:
    """What DistributedDataParallel does to gradients."""
    return gather(value[None]).mean(0) if world_size() > 1 else value


def step(name: str, rank: int, world: int) -> dict[str, object]:
    """Pair losses, choices, loss, averaged gradients, what is analysed, and the buffers after the step."""
    torch.manual_seed(0)
    name, slash, how = name.partition("/")
    objective = built(name, **FIELDS.get(name, {}))
    crops = tuple(share(group, rank, world) for group in crops_for(name, BATCH))
    scores = objective.pair_losses(crops, SCORED.get(slash + how, SelectionConfig()))
    choice = select(scores.losses_BP, "hardest")
    objective.watching = True
    labels = share(torch.arange(BATCH) % 3, rank, world)
    loss, _ = objective.loss(objective.take(crops, choice, scores), labels)
    loss.backward()
    gradients = {n: average(p.grad) for n, p in objective.named_parameters() if p.grad is not None}
    objective.after_step()
    buffers = {n: b for n, b in objective.named_buffers() if "num_batches" not in n}
    return {
        "losses": scores.losses_BP,
        "choice": choice,
        "loss": average(loss.detach()),
        "gradients": gradients,
        "buffers": buffers,
        "analyses": [
            task_statistics(task) | {"probabilities": matching_probabilities(task)} for task in objective.contrasts
        ],
    }


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save({name: step(name, rank, world) for name in NAMES}, folder / f"{rank}.pt")
    dist.destroy_process_group()
