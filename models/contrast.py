"""InfoNCE against a set of negatives, with or without synthetic ones, and its table over all pairs of views.

Shape suffixes: B images, K negatives, N views, P pairs, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.negatives import NegativesConfig, draw, synthetic_similarities
from models.selection import pair_index


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
    similarity_BK = q_BD @ negatives_KD.T
    if barred_BK is not None:
        similarity_BK = similarity_BK.masked_fill(barred_BK, -1.0)
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
    rest_first_NB, rest_second_NB = (
        torch.logsumexp(q_NBD @ queue.T / temperature, dim=-1) for queue in (first_KD, second_KD)
    )
    positive_NNB = torch.einsum("abd,cbd->acb", q_NBD, k_NBD) / temperature
    a, b = pair_index(len(q_NBD), q_NBD.device).T
    forward = torch.logaddexp(positive_NNB[a, b], rest_second_NB[a]) - positive_NNB[a, b]
    backward = torch.logaddexp(positive_NNB[b, a], rest_first_NB[b]) - positive_NNB[b, a]
    return (forward + backward).T
