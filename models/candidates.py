"""Which views of a batch are worth a forward of the target, and which of them its other blocks.

Shape suffixes: B images, N views, P pairs; R images that train on a random pair, S others; V views of all images; M
views of an image, Q pairs of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.selection import Rule, pair_index


@dataclass(frozen=True)
class RandomPairs:
    """Images that train on a random pair whatever their scores would be; how many, the host knows."""

    rows_R: Tensor
    """int64: their rows."""
    pairs_R: Tensor
    """int64: their pairs."""
    others_S: Tensor
    """int64: the rows of all other images, ascending."""

    @classmethod
    def none(cls, images: int, device: torch.device) -> RandomPairs:
        """Of a batch in which every image is scored."""
        nobody = torch.empty(0, dtype=torch.int64, device=device)
        return cls(nobody, nobody, torch.arange(images, device=device))

    @classmethod
    def drawn(cls, order_B: Tensor, pairs_B: Tensor, share: float) -> RandomPairs:
        """A share of the images, rounded: the first ones in a random order. Unless it is all, two or more are left, as
        heads with BatchNorm want; `pairs_B` is a random pair of every image."""
        images = len(order_B)
        count = images if share == 1 else min(int(share * images + 0.5), max(images - 2, 0))
        rows_R = order_B[:count]
        return cls(rows_R, pairs_B[rows_R], order_B[count:].sort().values)

    @property
    def images(self) -> int:
        """B."""
        return len(self.rows_R) + len(self.others_S)

    def put(self, best_B: Tensor) -> Tensor:
        """int64 [B]: each image's best pair, but for these images, which take their own."""
        return best_B.index_copy(0, self.rows_R, self.pairs_R)

    def spread(self, values_S: Tensor, missing: float) -> Tensor:
        """[B, …]: the other images' values, and `missing` for these."""
        whole_B = values_S.new_full((self.images, *values_S.shape[1:]), missing)
        return whole_B.index_copy_(0, self.others_S, values_S)


class Views:
    """Some of a batch's views: M of each image that is scored, and the pairs of those that are not, V = S·M + 2R."""

    def __init__(self, random: RandomPairs, numbers_SM: Tensor, views: int) -> None:
        """`numbers_SM`: which of their N = `views` views, int64, ascending."""
        scored, count = numbers_SM.shape
        pair_R2 = pair_index(views, numbers_SM.device)[random.pairs_R]
        self._rows_V = torch.cat([random.others_S.repeat_interleave(count), random.rows_R.repeat_interleave(2)])
        self._numbers_V = torch.cat([numbers_SM.flatten(), pair_R2.flatten()])
        self._shape, self._scored = (random.images, views), (scored, count)
        self._whole = (scored, count) == self._shape

    @classmethod
    def all(cls, random: RandomPairs, views: int) -> Views:
        """All N = `views` views of the images that are scored."""
        scored = len(random.others_S)
        return cls(random, torch.arange(views, device=random.others_S.device).expand(scored, views), views)

    def of(self, values_BN: Tensor) -> Tensor:
        """[V, …]: of the values of all views those of these; without a copy where these are all."""
        return values_BN.flatten(0, 1) if self._whole else values_BN[self._rows_V, self._numbers_V]

    def scored(self, values_V: Tensor) -> Tensor:
        """[S, M, …]: of the values of these views those of images that are scored."""
        images, views = self._scored
        return values_V[: images * views].unflatten(0, self._scored)

    def place(self, numbers_SM: Tensor) -> Tensor:
        """int64 [S·M + 2R]: which of these, where they are all views, the views of some numbers are."""
        images, views = self._scored
        start_S1 = torch.arange(0, images * views, views, device=numbers_SM.device)[:, None]
        pairs_2R = torch.arange(images * views, len(self._rows_V), device=numbers_SM.device)
        return torch.cat([(start_S1 + numbers_SM).flatten(), pairs_2R])

    def spread(self, values_V: Tensor) -> Tensor:
        """[B, N, …]: these views' values, and NaN for others, so that whoever takes those notices."""
        whole_BN = values_V.new_full((*self._shape, *values_V.shape[1:]), torch.nan)
        return whole_BN.index_put_((self._rows_V, self._numbers_V), values_V)


def finalists(scores_SP: Tensor, views: int, count: int, rule: Rule, barred_P: Tensor | None = None) -> Tensor:
    """int64 [S, M]: the M = `count` views of each image whose best pairs come first by the rule: those of the best
    pair and, for each further place, the one that most likely still beats it. Ascending; barred pairs do not count."""
    scores_SP = -scores_SP if rule == "easiest" else scores_SP
    if barred_P is not None:
        scores_SP = scores_SP.masked_fill(barred_P, -torch.inf)
    index_P2 = pair_index(views, scores_SP.device)
    member_NP = (index_P2 == torch.arange(views, device=scores_SP.device)[:, None, None]).any(2)
    best_SN = scores_SP[:, None].masked_fill(~member_NP, -torch.inf).amax(2)
    best_SN.scatter_(1, index_P2[scores_SP.argmax(1)], torch.inf)  # both, though others may be as good
    return best_SN.topk(count, dim=1).indices.sort(1).values


def pairs_among(numbers_SM: Tensor, views: int) -> Tensor:
    """int64 [S, Q]: the numbers that the pairs of some views, ascending, have among the pairs of all `views`."""
    a_SQ, b_SQ = numbers_SM[:, pair_index(numbers_SM.shape[1], numbers_SM.device)].unbind(2)
    return a_SQ * (2 * views - a_SQ - 1) // 2 + b_SQ - a_SQ - 1
