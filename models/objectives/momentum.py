"""What objectives with a momentum target share: the two encoders, all views' queries and keys, the moving target.

Where the target alone scores pairs, it guesses the online encoder's queries: the online heads on the target's features.
That alone can go wrong for good. The online encoder may represent what the chosen pairs differ in the other way round
than the target, which follows it and never arrives; then every pair that looks hard is easy, and stays chosen. So the
guess is corrected by what training saw of both encoders: see `Correction`.

Shape suffixes: B images, N views, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.correction import Correction
from models.heads import unit
from models.momentum import follow, momentum_at
from models.objectives.base import Chosen, Encoder, Length, Objective, momentum_encoder, per_view
from models.selection import SelectionConfig, without_side_effects


class MomentumObjective(Objective):
    """Online encoder f_q = backbone + projector + predictor; target f_k = backbone + projector by momentum."""

    target: Encoder  # pyright: ignore[reportIncompatibleVariableOverride]  # never None here

    def __init__(
        self,
        backbone: BackboneConfig,
        length: Length,
        heads: Callable[[int], tuple[nn.Module, nn.Module]],
        width: int,
        momentum: float,
    ) -> None:
        """`heads`: width of the features → projector and predictor, which end in `width`; `momentum`: of the target, at
        the start."""
        super().__init__(length)
        self._momentum = momentum
        model = build_backbone(backbone, backbone.drop_path)
        features = feature_width(model)
        self.online = Encoder(model, *heads(features))
        self.target = momentum_encoder(self.online, backbone)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.correction = Correction(features, width)

    def queries_and_keys(self, features: dict[str, Tensor | None], selection: SelectionConfig) -> tuple[Tensor, Tensor]:
        """Unit queries and keys [N, B, D] of all views. Where the online encoder alone was run, its projections are the
        keys; where the target alone was, the queries are guessed."""
        online, target = features["online"], features["target"]
        encoder, judged = (self.online, online) if target is None else (self.target, target)
        assert judged is not None
        k_NBD = unit(per_view(encoder.projector, judged, selection))
        q_NBD = unit(per_view(self.online.head, judged if online is None else online, selection))
        if online is None:
            q_NBD = unit(self.correction(q_NBD, judged.transpose(0, 1)))
        return q_NBD, k_NBD

    def embeddings(self, chosen: Chosen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pair's unit queries q1, q2, with their graph, and unit keys k1, k2, all [B, D]. Keeps what monitors look
        at, and what corrects the next guesses."""
        features1, features2 = self.pair_features(chosen)
        q1, q2 = unit(self.online.head(features1)), unit(self.online.head(features2))
        with torch.no_grad():
            k1, k2 = self._keys(chosen)
        self.seen_features_BD = features1.detach()
        self.keep_positives((q1, k2), (q2, k1))
        if chosen.judged_B2D is not None:
            self._learn_guess(chosen.judged_B2D, q1, q2)
        return q1, q2, k1, k2

    def _keys(self, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """From the features that selection computed where it did."""
        if chosen.features_B2D is None:
            k1, k2 = (self.target(x) for x in chosen.crops[0].unbind(1))
        else:
            k1, k2 = (self.target.head(features) for features in chosen.features_B2D.unbind(1))
        return unit(k1), unit(k2)

    def _learn_guess(self, judged_B2D: Tensor, *queries: Tensor) -> None:
        """Remembers how far guesses of the chosen pair's queries were from the true ones."""
        with without_side_effects(self.online):
            for features_BD, q_BD in zip(judged_B2D.unbind(1), queries, strict=True):
                self.correction.learn(features_BD, q_BD - unit(self.online.head(features_BD)))

    def after_step(self) -> None:
        """Moves the target: θ_k ← m·θ_k + (1 − m)·θ_q, with m rising to 1 by a cosine."""
        follow(self.target, self.online, momentum_at(self.step, self.length.steps, self._momentum))
        self.correction.update()
        super().after_step()

    def skip_step(self) -> None:
        self.correction.skip()
        super().skip_step()
