"""Base of the objectives with a momentum target: two encoders, queries and keys of all views, the target's update.

Where the target alone scores pairs, the online encoder's features are predicted from the target's: see `Correction`.
The online heads on the target's own features could go wrong for good: pairs that the online encoder finds easy could
look hard to the target, and stay chosen.

Shape suffixes: B images, N views, D width.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.correction import Correction
from models.heads import unit
from models.objectives.base import Chosen, Encoder, Features, Length, Objective, per_view
from models.selection import SelectionConfig


def momentum_encoder(online: Encoder, config: BackboneConfig) -> Encoder:
    """The online encoder's copy without predictor, with the target's own drop path; no gradients."""
    backbone = build_backbone(config, config.target_drop_path)  # built anew, because its drop path differs
    backbone.load_state_dict(online.backbone.state_dict())
    return Encoder(backbone.requires_grad_(False), copy.deepcopy(online.projector).requires_grad_(False))


def momentum_at(step: int, total: int, start: float) -> float:
    """Cosine from `start` at step 0 to 1 at step `total` (BYOL, section 3.1; MoBY)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(step / total, 1.0)) + 1) / 2


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """θ_target ← m·θ_target + (1 − m)·θ_online, over the parameters that both have, by name."""
    sources = dict(online.named_parameters())
    pairs = [(p, sources[name]) for name, p in target.named_parameters()]
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        [p for p, _ in pairs], [q.detach() for _, q in pairs], 1 - momentum
    )


class MomentumObjective(Objective):
    """Online encoder f_q = backbone + projector + predictor; target f_k = backbone + projector by momentum."""

    target: Encoder  # pyright: ignore[reportIncompatibleVariableOverride]  # never None here
    correction: Correction  # pyright: ignore[reportIncompatibleVariableOverride]  # nor this

    def __init__(
        self,
        backbone: BackboneConfig,
        length: Length,
        heads: Callable[[int], tuple[nn.Module, nn.Module]],
        momentum: float,
    ) -> None:
        """`heads`: width of the features → projector and predictor; `momentum`: of the target, at the start."""
        super().__init__(length)
        self._momentum = momentum
        model = build_backbone(backbone, backbone.drop_path)
        self.online = Encoder(model, *heads(feature_width(model)))
        self.target = momentum_encoder(self.online, backbone)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.correction = Correction(feature_width(model))  # pyright: ignore[reportIncompatibleVariableOverride]

    def queries_and_keys(self, features: Features, selection: SelectionConfig) -> tuple[Tensor, Tensor]:
        """Unit queries and keys [N, B, D] of all views."""
        assert features.target_BND is not None
        queries_NBD = per_view(self.online.head, features.online_BND, selection)
        return unit(queries_NBD), unit(per_view(self.target.projector, features.target_BND, selection))

    def embeddings(self, chosen: Chosen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pair's unit queries q1, q2, with their graph, and unit keys k1, k2, all [B, D]. Keeps the features and
        embeddings that monitors read, and teaches the correction."""
        features1, features2 = self.pair_features(chosen)
        q1, q2 = unit(self.online.head(features1)), unit(self.online.head(features2))
        with torch.no_grad():
            target1, target2 = self._target_features(chosen)
            k1, k2 = unit(self.target.head(target1)), unit(self.target.head(target2))
        self.seen_features_BD = features1.detach()
        self.keep_positives((q1, k2), (q2, k1))
        if chosen.scored_B2D is not None:
            self.correction.observe(chosen.scored_B2D[:, 0], features1)
            self.correction.observe(chosen.scored_B2D[:, 1], features2)
        return q1, q2, k1, k2

    def _target_features(self, chosen: Chosen) -> list[Tensor]:
        """[B, D] of the pair's first and second views: those that selection computed where it did."""
        if chosen.features_B2D is not None:
            return list(chosen.features_B2D.unbind(1))
        return [self.target.features(x_BCHW) for x_BCHW in chosen.crops[0].unbind(1)]

    def after_step(self) -> None:
        """Moves the target: θ_k ← m·θ_k + (1 − m)·θ_q, with m rising to 1 by a cosine."""
        follow(self.target, self.online, momentum_at(self.step, self.length.steps, self._momentum))
        self.correction.update()
        super().after_step()

    def skip_step(self) -> None:
        self.correction.skip()
        super().skip_step()
