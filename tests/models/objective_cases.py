"""Every objective of the registry at a size for tests, and the papers' formulas for one pair of views, written out.

The formulas take what an encoder makes of whole batches, image by image and term by term, and share no code with the
objectives.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones import BackboneConfig
from models.negatives import NONE
from models.objectives import (
    BYOLConfig,
    DINOConfig,
    IBOTConfig,
    Length,
    MoBYConfig,
    MoCoV3Config,
    Objective,
    ObjectiveConfig,
    SimCLRConfig,
    SimSiamConfig,
    SwAVConfig,
    build_objective,
)
from models.objectives.dino import DINO

STILL = BackboneConfig("vit_tiny_patch16_224", 16, patch_size=8, width=32, depth=2, heads=2)
RESTLESS = replace(STILL, drop_path=0.2, target_drop_path=0.1, batchnorm_mlp=True)

CONFIGS: dict[str, ObjectiveConfig] = {
    "moby": MoBYConfig(NONE, queue=32, hidden=16, width=12),
    "moco_v3": MoCoV3Config(hidden=16, width=12),
    # Each view by itself, as pairs are scored.
    "simclr": SimCLRConfig(hidden=16, width=12, joint_norm=False),
    "simsiam": SimSiamConfig(width=16, bottleneck=8),
    "byol": BYOLConfig(hidden=16, width=12),
    "swav": SwAVConfig(prototypes=10, hidden=16, width=12, freeze_epochs=0, joint_norm=False),
    "dino": DINOConfig(outputs=24, hidden=16, bottleneck=12, local_views=3, freeze_epochs=0),
    "ibot": IBOTConfig(outputs=24, hidden=16, bottleneck=12, local_views=3, freeze_epochs=0),
}


def built(name: str, backbone: BackboneConfig = STILL, **fields: Any) -> Objective:
    """The objective in training mode, its target moved away from the online encoder."""
    objective = build_objective(replace(CONFIGS[name], **fields), backbone, Length(20, 5)).train()
    if objective.target is not None:
        with torch.no_grad():
            for parameter in objective.target.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    if isinstance(objective, DINO):
        objective.centre_K.normal_(std=0.1)
    return objective


def crops_for(name: str, batch: int = 5, views: int = 4, local_views: int = 6) -> tuple[Tensor, ...]:
    crops = (torch.randn(batch, views, 3, 16, 16),)
    return (*crops, torch.randn(batch, local_views, 3, 8, 8)) if name in ("dino", "ibot") else crops


def nce(q_BD: Tensor, k_BD: Tensor, image: int, temperature: float) -> Tensor:
    """−log of the share that image's own key has among all keys (MoCo v3, equation 1)."""
    terms = [torch.exp(q_BD[image] @ k / temperature) for k in k_BD]
    return -torch.log(terms[image] / sum(terms))


def moco_v3(o: Any, x1: Tensor, x2: Tensor) -> Tensor:
    tau = o.config.temperature
    q1, q2 = (F.normalize(o.online(x), dim=1) for x in (x1, x2))
    k1, k2 = (F.normalize(o.target(x), dim=1).detach() for x in (x1, x2))
    return torch.stack([2 * tau * (nce(q1, k2, i, tau) + nce(q2, k1, i, tau)) for i in range(len(x1))])


def simclr(o: Any, x1: Tensor, x2: Tensor) -> Tensor:
    """NT-Xent over the 2B views (equation 1 of SimCLR)."""
    tau, batch = o.config.temperature, len(x1)
    z = F.normalize(torch.cat([o.online(x1), o.online(x2)]), dim=1)

    def one(i: int, j: int) -> Tensor:
        others = sum(torch.exp(z[i] @ z[k] / tau) for k in range(2 * batch) if k != i)
        return -torch.log(torch.exp(z[i] @ z[j] / tau) / others)

    return torch.stack([(one(i, i + batch) + one(i + batch, i)) / 2 for i in range(batch)])


def simsiam(o: Any, x1: Tensor, x2: Tensor) -> Tensor:
    z1, z2 = (o.online.projector(o.online.backbone(x)) for x in (x1, x2))
    p1, p2 = (o.online.predictor(z) for z in (z1, z2))
    return -(F.cosine_similarity(p1, z2.detach()) + F.cosine_similarity(p2, z1.detach())) / 2


def byol(o: Any, x1: Tensor, x2: Tensor) -> Tensor:
    q1, q2 = (F.normalize(o.online(x), dim=1) for x in (x1, x2))
    k1, k2 = (F.normalize(o.target(x), dim=1).detach() for x in (x1, x2))
    return (q1 - k2).square().sum(1) + (q2 - k1).square().sum(1)


def naive_sinkhorn(scores_BK: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Appendix A.1 of SwAV, on the K × B matrix."""
    q_KB = torch.exp(scores_BK.detach() / epsilon).T
    q_KB = q_KB / q_KB.sum()
    prototypes, batch = q_KB.shape
    for _ in range(iterations):
        q_KB = q_KB / q_KB.sum(1, keepdim=True) / prototypes
        q_KB = q_KB / q_KB.sum(0, keepdim=True) / batch
    return (q_KB * batch).T


def swav(o: Any, x1: Tensor, x2: Tensor) -> Tensor:
    config, prototypes = o.config, F.normalize(o.prototypes_KD, dim=1)
    s1, s2 = (F.normalize(o.online(x), dim=1) @ prototypes.T for x in (x1, x2))
    c1, c2 = (naive_sinkhorn(s, config.epsilon, config.iterations) for s in (s1, s2))
    p1, p2 = (torch.log_softmax(s / config.temperature, 1) for s in (s1, s2))
    return -((c1 * p2).sum(1) + (c2 * p1).sum(1)) / 2


def dino(o: Any, globals_: list[Tensor], locals_: list[Tensor]) -> Tensor:
    """DINO, equation 3, and the mean over its terms, for given views."""
    teacher = [((o.target(x) - o.centre_K) / o.config.teacher_temperature).softmax(1).detach() for x in globals_]
    student = [(o.online(x) / o.config.student_temperature).log_softmax(1) for x in [*globals_, *locals_]]
    terms = [-(t * s).sum(1) for i, t in enumerate(teacher) for v, s in enumerate(student) if v != i]
    assert len(terms) == math.prod((2, len(student) - 1))
    return torch.stack(terms).mean(0)


NAIVE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "moco_v3": moco_v3,
    "simclr": simclr,
    "simsiam": simsiam,
    "byol": byol,
    "swav": swav,
    "dino": lambda o, x1, x2: dino(o, [x1, x2], []),
}
