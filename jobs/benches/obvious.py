"""The same learning written the obvious way, to measure against and to test against: nothing is saved or shared.

Synthetic negatives are built vector by vector, their gradients found by autograd in a loop; selection loops over pairs.

Shape suffixes: B images, K negatives, L synthetic negatives of a kind, N views, P pairs, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.negatives import KINDS, Draws, NegativesConfig, draw
from models.objectives.moby import MoBY
from models.selection import SelectionConfig, without_side_effects


def naive_vectors(config: NegativesConfig, q_BD: Tensor, negatives_KD: Tensor, draws: Draws) -> list[Tensor]:
    """The synthetic negatives of each kind by METHODS' table, [B, L, D] each, of unit length."""
    sizes = list(config.counts.values())
    n = dict(zip(KINDS, (negatives_KD[index] for index in draws.index_BL.split(sizes, 1)), strict=True))
    q_B1D = q_BD.detach()[:, None]
    alpha, beta, gamma = (c[..., None] for c in (draws.alpha_BL, draws.beta_BL, draws.gamma_BL))
    slopes = {kind: similarity_slopes(config, q_BD, n[kind]) for kind in ("perturbation", "adversarial")}
    vectors = [
        alpha * q_B1D + (1 - alpha) * n["interpolation"],
        q_B1D + beta * (n["extrapolation"] - q_B1D),
        gamma * n["mixing"] + (1 - gamma) * negatives_KD[draws.partner_BL],
        n["noise"] + draws.noise_LD,
        n["perturbation"] + config.delta * slopes["perturbation"],
        n["adversarial"] + config.eta * slopes["adversarial"].sign(),
    ]
    return [F.normalize(v, dim=-1) for v in vectors]


def similarity_slopes(config: NegativesConfig, q_BD: Tensor, n_BLD: Tensor) -> Tensor:
    """∇_n sim(q, n) by one autograd call per synthetic negative."""
    slopes = torch.empty_like(n_BLD)
    for number in range(n_BLD.shape[1]):
        n_BD = n_BLD[:, number].clone().requires_grad_()
        if config.gradient == "dot":
            similarity = (q_BD.detach() * n_BD).sum()
        else:
            similarity = F.cosine_similarity(q_BD.detach(), n_BD, dim=1).sum()
        (slopes[:, number],) = torch.autograd.grad(similarity, n_BD)
    return slopes


def naive_similarities(config: NegativesConfig, q_BD: Tensor, negatives_KD: Tensor, draws: Draws) -> Tensor:
    """[B, ΣL]: q·s of all kinds, with s built and detached."""
    vectors = naive_vectors(config, q_BD, negatives_KD, draws)
    return torch.cat([torch.einsum("bd,bld->bl", q_BD, v.detach()) for v in vectors], 1)


def naive_info_nce(
    q_BD: Tensor, k_BD: Tensor, negatives_KD: Tensor, temperature: float, config: NegativesConfig | None
) -> Tensor:
    """Equation 1 of SynBY by concatenation of all logits."""
    similarity_BK = q_BD @ negatives_KD.T
    parts = [(q_BD * k_BD).sum(1, keepdim=True), similarity_BK]
    if config is not None:
        drawn = draw(config, similarity_BK, q_BD.shape[1])
        parts.append(naive_similarities(config, q_BD, negatives_KD, drawn))
    logits = torch.cat(parts, 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device))


def loop_pair_losses(moby: MoBY, views_BNCHW: Tensor, selection: SelectionConfig) -> Tensor:
    """[B, P]: every view forwarded once through both encoders, then a full InfoNCE per pair and direction."""
    with without_side_effects(moby):
        q = [F.normalize(moby.online(view), dim=1) for view in views_BNCHW.unbind(1)]
        k = [F.normalize(moby.target(view), dim=1) for view in views_BNCHW.unbind(1)]
        losses = []
        for a in range(selection.views):
            for b in range(a + 1, selection.views):
                total = torch.zeros(len(views_BNCHW), device=views_BNCHW.device)
                for q_BD, k_BD, queue in ((q[a], k[b], moby.queue2), (q[b], k[a], moby.queue1)):
                    positive = (q_BD * k_BD).sum(1, keepdim=True)
                    logits = torch.cat([positive, q_BD @ queue.rows_KD.T], 1) / moby.config.temperature
                    zeros = torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device)
                    total = total + F.cross_entropy(logits, zeros, reduction="none")
                losses.append(total)
        return torch.stack(losses, 1)


def naive_loss(moby: MoBY, pair_B2CHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the chosen pair with everything computed again, and both views' keys."""
    x1, x2 = pair_B2CHW.unbind(1)
    q1, q2 = (F.normalize(moby.online(x), dim=1) for x in (x1, x2))
    with torch.no_grad():
        k1, k2 = (F.normalize(moby.target(x), dim=1) for x in (x1, x2))
    config = moby.config
    synthetic = config.negatives.at(moby.epoch, moby.length.epochs)
    first = naive_info_nce(q1, k2, moby.queue2.rows_KD, config.temperature, synthetic)
    second = naive_info_nce(q2, k1, moby.queue1.rows_KD, config.temperature, synthetic)
    return first + second, k1, k2
