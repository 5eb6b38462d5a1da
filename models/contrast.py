"""InfoNCE against a set of negatives, with or without synthetic ones, and its table over all pairs of views.

Always in fp32, whatever surrounds it: under a temperature of 0.2 a similarity rounded to bf16 is off by up to 2 %.

Shape suffixes: B images, K negatives, N views, P pairs, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.negatives import NegativesConfig, draw, synthetic_similarities
from models.selection import pair_index


@dataclass(frozen=True)
class Contrast:
    """A contrastive task: tell the key of each query from its negatives. What objectives learn, and what
    `models.probes` analyses."""

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
    """Negatives that a query leaves out (its own rows of an in-batch set; those of its class in the oracle run)."""

    def __post_init__(self) -> None:
        """Counts that are given as a share become numbers here, where the number of negatives is known."""
        if self.synthetic is not None:
            object.__setattr__(self, "synthetic", self.synthetic.beside(len(self.negatives_KD)))

    def detached(self) -> "Contrast":
        """A copy without its graph, which later writes to a queue do not change."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: v.detach().clone() for n, v in parts.items() if isinstance(v, Tensor)})


def same_class(labels_B: Tensor | None, negative_labels_K: Tensor | None) -> Tensor:
    """bool [B, K]: which negatives have the query's class: MoCHi's oracle (section 3.2 there) leaves these
    out. A label below 0 is unknown and matches none.

    Raises:
        ValueError: there are no labels.
    """
    if labels_B is None or negative_labels_K is None:
        raise ValueError(
            "objective.oracle: it leaves out negatives of the query's class, and no labels are given; "
            "take labelled images or set it to false"
        )
    return (labels_B[:, None] == negative_labels_K) & (labels_B[:, None] >= 0)


def contrastive_loss(tasks: Sequence[Contrast], scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of the tasks' losses times `scale`, and the means of their metrics; see `info_nce`. `loss_real` is scaled and
    summed as the loss."""
    results = [info_nce(t.q_BD, t.k_BD, t.negatives_KD, t.temperature, t.synthetic, t.barred_BK) for t in tasks]
    metrics = {name: torch.stack([parts[name] for _, parts in results]).mean() for name in results[0][1]}
    if "loss_real" in metrics:
        metrics["loss_real"] = scale * len(tasks) * metrics["loss_real"]
    return scale * torch.stack([loss for loss, _ in results]).sum(), metrics


def chance(negatives: int, synthetic: NegativesConfig | None = None, left_out: int = 0) -> float:
    """ln(1 + K + L): InfoNCE where the key is as similar to its query as each of K real and L synthetic negatives.
    `negatives` counts the rows, `left_out` those of them that a query leaves out."""
    made = synthetic.beside(negatives).total if synthetic is not None else 0
    return math.log(1 + negatives - left_out + made)


def info_nce(
    q_BD: Tensor,
    k_BD: Tensor,
    negatives_KD: Tensor,
    temperature: float,
    synthetic: NegativesConfig | None = None,
    barred_BK: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Equation 1 of SynBY: mean over the batch of −log softmax of the positive; and the proxy task's accuracy.

    `q_BD`, `k_BD` and `negatives_KD` are unit rows in fp32; the gradient goes to all that have a graph. With
    `synthetic`, its negatives are appended; they are constants, whatever they are made from. `barred_BK` marks
    negatives that are left out, and from which no synthetic ones are made.
    Metrics: `proxy` and, with synthetic negatives, `proxy_synthetic`: share of keys ranked above all negatives; and
    `loss_real`, the loss against the real negatives alone.
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
    positive_B1 = (q_BD * k_BD).sum(1, keepdim=True)
    parts = [positive_B1, without(similarity_BK, barred_BK)]
    ranked_B1 = positive_B1 > parts[1].max(1, keepdim=True).values
    metrics = {"proxy": ranked_B1.float().mean()}
    if synthetic is not None:
        fixed_BK = q_BD @ negatives_KD.detach().T if negatives_KD.requires_grad else similarity_BK
        draws = draw(synthetic, fixed_BK, q_BD.shape[1], barred_BK)
        made_BL = synthetic_similarities(synthetic, q_BD, negatives_KD, fixed_BK, draws)
        parts.append(without(made_BL, None if barred_BK is None else barred_BK.all(1, keepdim=True)))
        ranked_B1 = ranked_B1 & (positive_B1 > parts[2].max(1, keepdim=True).values)
        metrics["proxy_synthetic"] = ranked_B1.float().mean()
    logits = torch.cat(parts, 1) / temperature
    target_B = torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device)
    if synthetic is not None:
        with torch.no_grad():
            metrics["loss_real"] = F.cross_entropy(logits[:, : 1 + len(negatives_KD)], target_B)
    return F.cross_entropy(logits, target_B), metrics


def without(similarity: Tensor, barred: Tensor | None) -> Tensor:
    """Similarities, below all others where barred."""
    return similarity if barred is None else similarity.masked_fill(barred, -torch.inf)


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
