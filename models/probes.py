"""What features are worth, without training on them: kNN, RankMe, spread, alignment and uniformity; and what the
contrastive tasks they are learned from are like (MoCHi's analyses).

Shape suffixes: n training images, q test images, C classes, D width, B images of a batch, K negatives,
L synthetic ones, M most similar ones.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.contrast import Contrast, same_class, without
from models.negatives import KINDS, Draws, NegativesConfig, draw, synthetic_similarities

CHUNK_ELEMENTS = 32_000_000  # similarities held at once: 128 MB in fp32
ROUNDING = 1e-6  # squared distances of unit vectors below this are rounding


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
    by cosine votes for its class with weight exp(similarity / temperature), here divided by the largest weight among
    a test image's neighbours, so that no temperature overflows. Classes that none of the k votes for have −1.

    Features need not be normalised; labels lie in 0 … C − 1. A k above n counts as n.
    """
    train_nD, test_qD = F.normalize(train_nD.float(), dim=1), F.normalize(test_qD.float(), dim=1)
    deepest = min(max(ks), len(train_nD))
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part_cD in test_qD.split(max(1, CHUNK_ELEMENTS // len(train_nD))):
        top = (part_cD @ train_nD.T).topk(deepest, dim=1)
        chosen = labels_n[top.indices]
        weights = ((top.values.double() - top.values[:, :1].double()) / temperature).exp()
        for k in ks:
            table, voted = (
                torch.zeros(len(part_cD), classes, device=part_cD.device, dtype=d) for d in (torch.float64, torch.bool)
            )
            table.scatter_add_(1, chosen[:, :k], weights[:, :k])
            voted.scatter_(1, chosen[:, :k], True)
            votes[k].append(table.masked_fill_(~voted, -1))
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
def relative_alignment(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Alignment as a share of the mean squared distance of two images' features: 1 where the views of an image are no
    nearer to each other than to another image's, 0 is best; NaN where all features are one."""
    first_BD, second_BD = F.normalize(first_BD.float(), dim=1), F.normalize(second_BD.float(), dim=1)
    own = (first_BD * second_BD).sum()
    others = (first_BD.sum(0) @ second_BD.sum(0) - own) / (len(first_BD) * (len(first_BD) - 1))
    distance = 2 - 2 * others
    return torch.where(distance > ROUNDING, alignment(first_BD, second_BD) / distance, torch.nan)


@torch.no_grad()
def uniformity(features_BD: Tensor) -> Tensor:
    """log of the mean of exp(−2‖x − y‖²) over pairs of images (Wang & Isola 2020, t = 2); lower is more uniform."""
    unit = F.normalize(features_BD.float(), dim=1)
    return torch.pdist(unit).square().mul(-2).exp().mean().log()


@torch.no_grad()
def matching_probabilities(task: Contrast, count: int = 1024) -> Tensor:
    """[B, min(count, K)]: each query's largest matching probabilities, descending (MoCHi, figure 2a); 0 behind the last
    negative of a query that leaves some out."""
    probabilities_BK = (similarities(task) / task.temperature).softmax(1).nan_to_num(0)
    return probabilities_BK.topk(min(count, probabilities_BK.shape[1]), dim=1).values


@torch.no_grad()
def task_statistics(task: Contrast, count: int = 1024) -> dict[str, Tensor]:
    """Statistics of a contrastive task per image: float [B] by name (MoCHi, section 3; figures 2b and 2c).

    - `proxy`, `proxy_synthetic`: 1 where the key ranks above all real negatives, above these and all synthetic ones
    - `false_negatives`: share of the `count` most similar negatives that have the query's class
    - `false_components`, `false_pairs`: share of synthetic negatives with such a negative in them, and of mixings of
      two such negatives

    Those with classes are NaN where the query's is unknown or no negative is left. Synthetic negatives are drawn anew,
    without moving torch's global generator.
    """
    similarity_BK = similarities(task)
    positive_B = (task.q_BD * task.k_BD).sum(1)
    ranked_B = positive_B > similarity_BK.max(1).values
    probes = {"proxy": ranked_B.float()}
    false_BK = false_negatives(task)
    if false_BK is not None:
        nearest = similarity_BK.topk(min(count, similarity_BK.shape[1]), dim=1)
        finite_BM = nearest.values > -torch.inf
        probes["false_negatives"] = (false_BK.gather(1, nearest.indices) * finite_BM).sum(1) / finite_BM.sum(1)
    if task.synthetic is not None and task.synthetic.total:
        with torch.random.fork_rng([task.q_BD.device] if task.q_BD.is_cuda else []):
            drawn = draw(task.synthetic, similarity_BK, task.q_BD.shape[1], task.barred_BK)
        all_BK = task.q_BD @ task.negatives_KD.T
        made_BL = synthetic_similarities(task.synthetic, task.q_BD, task.negatives_KD, all_BK, drawn)
        above_B = (positive_B > made_BL.max(1).values) | similarity_BK.isneginf().all(1)
        probes["proxy_synthetic"] = (ranked_B & above_B).float()
        if false_BK is not None:
            probes |= _false_components(task.synthetic, false_BK, drawn)
    return probes


def _false_components(config: NegativesConfig, false_BK: Tensor, drawn: Draws) -> dict[str, Tensor]:
    first_BL, partner_BL = false_BK.gather(1, drawn.index_BL), false_BK.gather(1, drawn.partner_BL)
    kinds = dict(zip(KINDS, first_BL.split(list(config.counts.values()), 1), strict=True))
    one = kinds | {"mixing": torch.maximum(kinds["mixing"], partner_BL)}
    probes = {"false_components": torch.cat(list(one.values()), 1).mean(1)}
    if config.mixing:
        probes["false_pairs"] = torch.minimum(kinds["mixing"], partner_BL).mean(1)
    return probes


def similarities(task: Contrast) -> Tensor:
    """[B, K]: of queries and negatives, −∞ where a query leaves one out."""
    return without(task.q_BD @ task.negatives_KD.T, task.barred_BK)


def false_negatives(task: Contrast) -> Tensor | None:
    """float [B, K]: 1 where query and negative have the same class; rows of NaN where the query's is unknown or all
    negatives are left out; None where no classes are known."""
    if task.labels_B is None or task.negative_labels_K is None:
        return None
    unknown_B = task.labels_B < 0
    if task.barred_BK is not None:
        unknown_B = unknown_B | task.barred_BK.all(1)
    return same_class(task.labels_B, task.negative_labels_K).float().masked_fill(unknown_B[:, None], torch.nan)


def by_source(sources_B: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Suffix → bool [B]: which images it is about, none → all, `/source` → a source's own. `sources_B` holds each
    image's index into `names`."""
    return {"": sources_B >= 0} | {f"/{name}": sources_B == number for number, name in enumerate(names)}


@torch.no_grad()
def positives_report(
    pairs: Sequence[tuple[Tensor, Tensor]], sources_B: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """`alignment` and `relative_alignment` of positive pairs and `uniformity` of their first members, means over
    `pairs`, which are embeddings [B, D] of the same images; over all images and for each source under `name/source`,
    where it has two or more."""
    probes = {}
    for suffix, own_B in by_source(sources_B, names).items():
        if own_B.sum() > 1:
            own = [(first_BD[own_B], second_BD[own_B]) for first_BD, second_BD in pairs]
            for name, probe in (("alignment", alignment), ("relative_alignment", relative_alignment)):
                probes[name + suffix] = torch.stack([probe(*pair) for pair in own]).mean()
            probes["uniformity" + suffix] = torch.stack([uniformity(first_BD) for first_BD, _ in own]).mean()
    return probes


@torch.no_grad()
def contrast_report(
    tasks: Sequence[Contrast], sources_B: Tensor, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scalars and curves of a step's contrastive tasks, means over tasks: `task_statistics` and the curve
    `matching_probabilities`, over all images and for each source under `name/source`. Scalars that nothing is known
    about are NaN."""
    scalars: dict[str, list[Tensor]] = {}
    curves: dict[str, list[Tensor]] = {}
    for task in tasks:
        statistics, probabilities_BM = task_statistics(task), matching_probabilities(task)
        for suffix, own_B in by_source(sources_B, names).items():
            for name, values_B in statistics.items():
                scalars.setdefault(name + suffix, []).append(values_B[own_B].nanmean())
            curves.setdefault("matching_probabilities" + suffix, []).append(probabilities_BM[own_B].mean(0))
    means = {name: torch.stack(values).mean() for name, values in scalars.items()}
    return means, {name: torch.stack(values).mean(0) for name, values in curves.items()}
