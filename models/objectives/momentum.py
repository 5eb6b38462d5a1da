"""What objectives with a momentum target share: the two encoders, all views' queries and keys, the moving target.

Where the target alone scores pairs, the online encoder's queries are guessed. The online heads on the target's features
would do, but can go wrong for good: the online encoder may represent what the chosen pairs differ in the other way
round than the target, which follows it and never arrives; then every pair that looks hard is easy, and stays chosen. So
the features that the heads see are corrected by what training saw of both encoders: see `Correction`. It takes the
tokens of a target that stopped early just as well; the other blocks are then run for the chosen pair alone.

Shape suffixes: B images, N views, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.blocks import Begun, scored_width, summary
from models.correction import Correction
from models.heads import unit
from models.momentum import follow, momentum_at
from models.objectives.base import (
    Chosen,
    Encoder,
    Length,
    Objective,
    Scores,
    all_views,
    momentum_encoder,
    per_view,
    scores_as_trained,
)
from models.selection import SelectionConfig, without_side_effects


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
        features = feature_width(model)
        self.online = Encoder(model, *heads(features))
        self.target = momentum_encoder(self.online, backbone)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.correction = Correction(features, scored_width(model))

    def pair_losses(self, crops: tuple[Tensor, ...], selection: SelectionConfig) -> Scores:
        """As every objective's; where the target alone scores by its first blocks, it can go on from there."""
        if selection.encoder != "target" or selection.layer is None:
            return super().pair_losses(crops, selection)
        self.check(selection)
        views_BNCHW, layer = crops[0], selection.layer
        device = views_BNCHW.device
        with without_side_effects(self, selection.batchnorm == "running"), self.arithmetic(selection, device):
            tokens_BNTD = all_views(self.target, views_BNCHW, selection, partial(self.target.begin, layer=layer))
            judged_BND = summary(self.target.backbone, tokens_BNTD.flatten(0, 1)).unflatten(0, views_BNCHW.shape[:2])
            losses_BP = self.pair_table({"online": None, "target": judged_BND}, selection)
        goes_on = scores_as_trained(self.target, replace(selection, layer=None), device)
        return Scores(losses_BP.float(), begun=Begun(tokens_BNTD, layer) if goes_on else None, judged_BND=judged_BND)

    def take(self, crops: tuple[Tensor, ...], choice_B: Tensor, scores: Scores | None) -> Chosen:
        chosen = super().take(crops, choice_B, scores)
        if scores is None or scores.begun is None:
            return chosen
        tokens_B2TD = scores.begun.take(choice_B)
        features = self.target.finish(tokens_B2TD.flatten(0, 1), scores.begun.layer)
        return replace(chosen, features_B2D=features.unflatten(0, tokens_B2TD.shape[:2]))

    def queries_and_keys(self, features: dict[str, Tensor | None], selection: SelectionConfig) -> tuple[Tensor, Tensor]:
        """Unit queries and keys [N, B, D] of all views. Where the online encoder alone was run, its projections are the
        keys; where the target alone was, both backbones' features are guessed."""
        online, target = features["online"], features["target"]
        if online is None:
            online, target = self.correction(target)
        assert online is not None
        keyed = online if target is None else target
        projector = self.online.projector if target is None else self.target.projector
        return unit(per_view(self.online.head, online, selection)), unit(per_view(projector, keyed, selection))

    def embeddings(self, chosen: Chosen) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pair's unit queries q1, q2, with their graph, and unit keys k1, k2, all [B, D]. Keeps what monitors look
        at, and what corrects the next guesses."""
        features1, features2 = self.pair_features(chosen)
        q1, q2 = unit(self.online.head(features1)), unit(self.online.head(features2))
        with torch.no_grad():
            target1, target2 = self._target_features(chosen)
            k1, k2 = unit(self.target.head(target1)), unit(self.target.head(target2))
        self.seen_features_BD = features1.detach()
        self.keep_positives((q1, k2), (q2, k1))
        if chosen.judged_B2D is not None:
            judged1, judged2 = chosen.judged_B2D.unbind(1)
            self.correction.learn(judged1, features1, target1)
            self.correction.learn(judged2, features2, target2)
        return q1, q2, k1, k2

    def _target_features(self, chosen: Chosen) -> list[Tensor]:
        """[B, F] of the pair's first and second views: those that selection computed where it did."""
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
