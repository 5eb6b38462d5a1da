"""Contrast against the other images of the batch, of all ranks, and its table over all pairs of views.

Always in fp32, whatever surrounds it: under a temperature of 0.2 a similarity rounded to bf16 is off by up to 2 %.

Shape suffixes: B images of this rank, G of all ranks, N views, P pairs, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.distributed import gather, rank
from models.negatives import NegativesConfig, draw, synthetic_similarities
from models.selection import pair_index


def own_rows(batch: int, device: torch.device) -> Tensor:
    """int64 [B]: where this rank's images stand among those of all ranks."""
    return torch.arange(batch, device=device) + rank() * batch


def batch_nce(
    q_BD: Tensor, k_GD: Tensor, temperature: float, synthetic: NegativesConfig | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """MoCo v3, algorithm 1: cross entropy of each query among the keys of all images; its own key is the target.

    Synthetic negatives are made from the other images' keys; an image's own key is never mined.
    Metrics: `proxy`, the share of queries that rank their own key first.
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        similarity_BG = q_BD @ k_GD.T
        own_B = own_rows(len(q_BD), q_BD.device)
        logits = [similarity_BG]
        if synthetic is not None:
            mined_BG = similarity_BG.scatter(1, own_B[:, None], -2.0)  # below every cosine
            draws = draw(synthetic, mined_BG, q_BD.shape[1])
            logits.append(synthetic_similarities(synthetic, q_BD, k_GD, similarity_BG, draws))
        proxy = (similarity_BG.argmax(1) == own_B).float().mean()
        return F.cross_entropy(torch.cat(logits, 1) / temperature, own_B), {"proxy": proxy}


def batch_pair_losses(q_NBD: Tensor, k_NBD: Tensor, temperature: float) -> Tensor:
    """[B, P]: nce(q_a, keys of view b) + nce(q_b, keys of view a) of each image, for every pair a < b of views."""
    with torch.autocast(q_NBD.device.type, enabled=False):
        batch = q_NBD.shape[1]
        keys_NGD = torch.stack([gather(k_BD) for k_BD in k_NBD])
        positive_NNB = torch.einsum("abd,cbd->acb", q_NBD, k_NBD) / temperature
        others_NDG = keys_NGD.transpose(1, 2)
        rest_NNB = torch.stack([torch.logsumexp(q_BD @ others_NDG / temperature, dim=-1) for q_BD in q_NBD])
        a, b = pair_index(len(q_NBD), q_NBD.device).T
        assert rest_NNB.shape[2] == batch
        return (rest_NNB[a, b] - positive_NNB[a, b] + rest_NNB[b, a] - positive_NNB[b, a]).T


def nt_xent(z1_BD: Tensor, z2_BD: Tensor, all1_GD: Tensor, all2_GD: Tensor, temperature: float) -> Tensor:
    """[B]: SimCLR's NT-Xent (equation 1 there) of both views of each image of this rank, their mean.

    A view's negatives are both views of all other images, of all ranks.
    """
    with torch.autocast(z1_BD.device.type, enabled=False):
        own_B = own_rows(len(z1_BD), z1_BD.device)
        losses = []
        for z, same, other in ((z1_BD, all1_GD, all2_GD), (z2_BD, all2_GD, all1_GD)):
            cross_BG = z @ other.T / temperature
            within_BG = (z @ same.T / temperature).scatter(1, own_B[:, None], -torch.inf)
            logits = torch.cat([cross_BG, within_BG], 1)
            losses.append(F.cross_entropy(logits, own_B, reduction="none"))
        return (losses[0] + losses[1]) / 2


def nt_xent_pair_losses(z_NBD: Tensor, temperature: float) -> Tensor:
    """[B, P]: `nt_xent` of every pair of views: what is within a view is shared by all its pairs."""
    with torch.autocast(z_NBD.device.type, enabled=False):
        all_NGD = torch.stack([gather(z_BD) for z_BD in z_NBD])
        own_B = own_rows(z_NBD.shape[1], z_NBD.device)
        within_NB = torch.stack(
            [
                torch.logsumexp((z @ everyone.T / temperature).scatter(1, own_B[:, None], -torch.inf), dim=1)
                for z, everyone in zip(z_NBD, all_NGD, strict=True)
            ]
        )
        cross_NNB = torch.stack([torch.logsumexp(z @ all_NGD.transpose(1, 2) / temperature, dim=-1) for z in z_NBD])
        positive_NNB = torch.einsum("abd,cbd->acb", z_NBD, z_NBD) / temperature
        a, b = pair_index(len(z_NBD), z_NBD.device).T
        forward = torch.logaddexp(cross_NNB[a, b], within_NB[a]) - positive_NNB[a, b]
        backward = torch.logaddexp(cross_NNB[b, a], within_NB[b]) - positive_NNB[b, a]
        return ((forward + backward) / 2).T
