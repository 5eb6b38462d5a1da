"""Contrast against the other images of the batch, of all ranks, and its table over all pairs of views.

Always in fp32, whatever surrounds it: under a temperature of 0.2 a similarity rounded to bf16 is off by up to 2 %.

Shape suffixes: B images of this rank, G of all ranks, S sets of them, K = S·G negatives, N views, P pairs, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.contrast import Contrast, same_class
from models.distributed import gather, rank
from models.negatives import NegativesConfig
from models.selection import pair_index


def own_rows(batch: int, device: torch.device) -> Tensor:
    """int64 [B]: where this rank's images stand among those of all ranks."""
    return torch.arange(batch, device=device) + rank() * batch


def batch_contrast(
    q_BD: Tensor,
    k_BD: Tensor,
    sets_SGD: Sequence[Tensor],
    temperature: float,
    synthetic: NegativesConfig | None = None,
    labels_B: Tensor | None = None,
    *,
    labelled: bool = False,
    oracle: bool = False,
) -> Contrast:
    """The task of telling an image's key from all other images' rows in S sets of unit rows of all ranks' images.

    `labelled` asks for the other images' classes; `oracle` leaves out those of the query's class.

    Raises:
        ValueError: the oracle has no labels, or synthetic negatives are made from more than the other images' rows.
    """
    rows_KD = torch.cat(list(sets_SGD))
    images, sets = len(sets_SGD[0]), len(sets_SGD)
    own_BG = own_rows(len(q_BD), q_BD.device)[:, None] == torch.arange(images, device=q_BD.device)
    barred_BK = own_BG.repeat(1, sets)
    labels_K = gather(labels_B).repeat(sets) if labels_B is not None and (labelled or oracle) else None
    if oracle:
        barred_BK |= same_class(labels_B, labels_K)
    return Contrast(q_BD, k_BD, rows_KD, temperature, synthetic, labels_B, labels_K, barred_BK)


def check_others(negatives: NegativesConfig, images: int, sets: int) -> None:
    """Raises:
    ValueError: synthetic negatives are made from more rows than the other images have in S sets of `images` rows.
    """
    others = sets * (images - 1)
    if negatives.total and negatives.hardest > others:
        raise ValueError(
            f"objective.negatives.hardest: {negatives.hardest} is more than the {others} negatives that "
            f"{images} images at once give; lower it or raise batch"
        )


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


def nt_xent_pair_losses(z_NBD: Tensor, temperature: float) -> Tensor:
    """[B, P]: SimCLR's NT-Xent (equation 1 there) of each image, the mean of both directions, for every pair of views.

    A view's negatives are both views of all other images, of all ranks; what is within a view is shared by its pairs.
    """
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
