"""What objectives with a momentum target share: the two encoders, all views' queries and keys, the moving target.

Shape suffixes: B images, N views, D width.
"""

from collections.abc import Callable

from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.heads import unit
from models.momentum import follow, momentum_at
from models.objectives.base import Chosen, Encoder, Length, Objective, momentum_encoder, per_view
from models.selection import SelectionConfig


class MomentumObjective(Objective):
    """Online encoder f_q = backbone + projector + predictor; target f_k = backbone + projector by momentum."""

    target: Encoder  # pyright: ignore[reportIncompatibleVariableOverride]  # never None here

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

    def queries_and_keys(self, features: dict[str, Tensor | None], selection: SelectionConfig) -> tuple[Tensor, Tensor]:
        """Unit queries and keys [N, B, D] of all views. Where only one encoder was run, its projections are the keys,
        and through the online predictor the queries."""
        online, target = features["online"], features["target"]
        encoder, judged = (self.online, online) if target is None else (self.target, target)
        assert judged is not None
        projected_NBD = per_view(encoder.projector, judged, selection)
        if online is None or target is None:
            q_NBD = per_view(self.online.predict, projected_NBD.transpose(0, 1), selection)
        else:
            q_NBD = per_view(self.online.head, online, selection)
        return unit(q_NBD), unit(projected_NBD)

    def keys(self, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """The pair's unit keys [B, D] each, from the features that selection computed where it did."""
        if chosen.features_B2D is None:
            k1, k2 = (self.target(x) for x in chosen.crops[0].unbind(1))
        else:
            k1, k2 = (self.target.head(features) for features in chosen.features_B2D.unbind(1))
        return unit(k1), unit(k2)

    def after_step(self) -> None:
        """Moves the target: θ_k ← m·θ_k + (1 − m)·θ_q, with m rising to 1 by a cosine."""
        follow(self.target, self.online, momentum_at(self.step, self.length.steps, self._momentum))
        super().after_step()
