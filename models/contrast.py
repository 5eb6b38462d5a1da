"""InfoNCE against a set of negatives, with or without synthetic ones, and its table over all pairs of views.

Always in fp32, whatever surrounds it: under a temperature of 0.2 a similarity rounded to bf16 is off by up to 2 %.

Shape suffixes: B images, K negatives, N views, P pairs, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.negatives import NegativesConfig, draw, synthetic_similarities
from models.selection import pair_index


@dataclass(frozen=True)
class Contrast:
    """One contrastive task of a step, without gradient: what `models.probes` analyses."""

    q_BD: Tensor
    k_BD: Tensor
    negatives_KD: Tensor
    temperature: float
    synthetic: NegativesConfig | None = None
    """Kinds and counts of synthetic negatives, where they take part."""
    labels_B: Tensor | None = None
    """Classes of the queries; below 0 unknown."""
    negative_labels_K: Tensor | None = None
    """Classes of the negatives; below 0 unknown."""
    barred_BK: Tensor | None = None
    """Negatives that a query leaves out (the oracle run; its own rows of an in-batch set)."""


def info_nce(
    q_BD: Tensor,
    k_BD: Tensor,
    negatives_KD: Tensor,
    temperature: float,
    synthetic: NegativesConfig | None = None,
    barred_BK: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 1 of SynBY: mean over the batch of −log softmax of the positive; and the proxy task's accuracy.

    `q_BD`, `k_BD` and `negatives_KD` are unit rows in fp32. With `synthetic`, its negatives are appended. `barred_BK`
    marks negatives that are left out (the oracle of MoCHi, section 3.2).
    Metrics: `proxy` and, with synthetic negatives, `proxy_synthetic`: share of keys ranked above all negatives.
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        return _info_nce(q_BD, k_BD, negatives_KD, temperature, synthetic, barred_BK)


def _info_nce(
    q_BD: Tensor,
    k_BD: Tensor,
    negatives_KD: Tensor,
    temperature: float,
    synthetic: NegativesConfig | None,
    barred_BK: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    similarity_BK = q_BD @ negatives_KD.T
    if barred_BK is not None:
        similarity_BK = similarity_BK.masked_fill(barred_BK, -1.0)  # nor are they mined, being the least similar
    positive_B1 = (q_BD * k_BD).sum(1, keepdim=True)
    parts = [positive_B1, similarity_BK if barred_BK is None else similarity_BK.masked_fill(barred_BK, -torch.inf)]
    ranked_B1 = positive_B1 > similarity_BK.max(1, keepdim=True).values
    metrics = {"proxy": ranked_B1.float().mean()}
    if synthetic is not None:
        draws = draw(synthetic, similarity_BK, q_BD.shape[1])
        parts.append(synthetic_similarities(synthetic, q_BD, negatives_KD, similarity_BK, draws))
        ranked_B1 = ranked_B1 & (positive_B1 > parts[-1].max(1, keepdim=True).values)
        metrics["proxy_synthetic"] = ranked_B1.float().mean()
    logits = torch.cat(parts, 1) / temperature
    target_B = torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device)
    return F.cross_entropy(logits, target_B), metrics


def queue_pair_losses(q_NBD: Tensor, k_NBD: Tensor, first_KD: Tensor, second_KD: Tensor, temperature: float) -> Tensor:
    """[B, P]: ctr(q_a, k_b, second queue) + ctr(q_b, k_a, first queue) of every pair a < b of views.

    A view's sum over a queue does not depend on its partner: one log-sum-exp per view and queue and an N × N table of
    products give all pairs, O(N) in the large terms.
    """
    with torch.autocast(q_NBD.device.type, enabled=False):
        rest_first_NB, rest_second_NB = (
            torch.logsumexp(q_NBD @ queue.T / temperature, dim=-1) for queue in (first_KD, second_KD)
        )
        positive_NNB = torch.einsum("abd,cbd->acb", q_NBD, k_NBD) / temperature
        a, b = pair_index(len(q_NBD), q_NBD.device).unbind(1)
        forward = F.softplus(rest_second_NB[a] - positive_NNB[a, b])
        backward = F.softplus(rest_first_NB[b] - positive_NNB[b, a])
        return (forward + backward).T
