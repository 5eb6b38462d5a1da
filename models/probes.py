"""What features are worth, without training on them: kNN, RankMe, spread, alignment and uniformity.

Shape suffixes: n training images, q test images, C classes, D width, B images of a batch, K negatives.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 32_000_000  # similarities held at once: 128 MB in fp32


@torch.no_grad()
def weighted_knn(
    train_nD: Tensor,
    labels_n: Tensor,
    test_qD: Tensor,
    classes: int,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, Tensor]:
    """k → votes [q, C], by weighted kNN (Wu et al. 2018, section 3.4; DINO): each of the k training images most similar
    by cosine votes for its class with weight exp(similarity / temperature).

    Features need not be normalised; labels lie in 0 … C − 1. A k above n counts as n.
    """
    train_nD, test_qD = F.normalize(train_nD.float(), dim=1), F.normalize(test_qD.float(), dim=1)
    deepest = min(max(ks), len(train_nD))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part_cD in test_qD.split(max(1, CHUNK_ELEMENTS // len(train_nD))):
        top = (part_cD @ train_nD.T).topk(deepest, dim=1)
        weights, chosen = (top.values / temperature).exp(), labels_n[top.indices]
        for k in ks:
            table = torch.zeros(len(part_cD), classes, device=part_cD.device)
            votes[k].append(table.scatter_add_(1, chosen[:, :k], weights[:, :k]))
    return {k: torch.cat(parts) for k, parts in votes.items()}


@torch.no_grad()
def rankme(features_BD: Tensor) -> Tensor:
    """Effective rank: exp of the entropy of the normalised singular values (Garrido et al. 2023, equation 1); 1 … D."""
    values = torch.linalg.svdvals(features_BD.float())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return torch.exp(-(shares * shares.log()).sum())


@torch.no_grad()
def feature_std(features_BD: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit features: 1/√D where spread evenly, 0 when collapsed."""
    return F.normalize(features_BD.float(), dim=1).std(0).mean()


@torch.no_grad()
def alignment(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Mean squared distance of unit features of two views of an image (Wang & Isola 2020, α = 2); 0 is best."""
    return (F.normalize(first_BD.float(), dim=1) - F.normalize(second_BD.float(), dim=1)).square().sum(1).mean()


@torch.no_grad()
def uniformity(features_BD: Tensor) -> Tensor:
    """log of the mean of exp(−2‖x − y‖²) over pairs of images (Wang & Isola 2020, t = 2); lower is more uniform."""
    unit = F.normalize(features_BD.float(), dim=1)
    return torch.pdist(unit).square().mul(-2).exp().mean().log()


@torch.no_grad()
def matching_probabilities(q_BD: Tensor, negatives_KD: Tensor, temperature: float, count: int = 1024) -> Tensor:
    """[min(count, K)]: the largest matching probabilities, descending, mean over queries (MoCHi, figure 2a)."""
    similarity_BK = q_BD @ negatives_KD.T / temperature
    return similarity_BK.softmax(1).topk(min(count, similarity_BK.shape[1]), dim=1).values.mean(0)


@torch.no_grad()
def false_negative_share(
    q_BD: Tensor, labels_B: Tensor, negatives_KD: Tensor, negative_labels_K: Tensor, count: int = 1024
) -> Tensor:
    """Share of the `count` negatives most similar to each labelled query that have its label (MoCHi, section 3.2)."""
    nearest = (q_BD @ negatives_KD.T).topk(min(count, len(negatives_KD)), dim=1).indices
    same = (negative_labels_K[nearest] == labels_B[:, None]) & (labels_B[:, None] >= 0)
    known = (labels_B >= 0).sum() * nearest.shape[1]
    return same.sum() / known
