"""What objectives with a momentum target share: the two encoders, all views' queries and keys, the moving target.

Where the target alone scores pairs, the online encoder's queries are guessed. The online heads on the target's features
would do, but can go wrong for good: the online encoder may represent what the chosen pairs differ in the other way
round than the target, which follows it and never arrives; then every pair that looks hard is easy, and stays chosen. So
the features that the heads see are corrected by what training saw of both encoders: see `Correction`. The same guesses
both encoders' features from what the target's first blocks make of a view, well enough to tell which view of an image
is in no hard pair; the other blocks are then spared that one.

Shape suffixes: B images, N views, T tokens, D width; V views of all images that are run.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.blocks import summary, summary_width
from models.candidates import RandomPairs, Views, finalists, pairs_among
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
    has_batchnorm,
    momentum_encoder,
    per_view,
)
from models.selection import SelectionConfig, pairs, same_policy, without_side_effects


class MomentumObjective(Objective):
    """Online encoder f_q = backbone + projector + predictor; target f_k = backbone + projector by momentum."""

    target: Encoder  # pyright: ignore[reportIncompatibleVariableOverride]  # never None here
    has_finalists = True

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
        self.correction = Correction(features, features)
        # For the summary of what a ViT's first blocks make of a view.
        self.begun_correction = (
            Correction(features, summary_width(model)) if isinstance(model, VisionTransformer) else None
        )

    def check(self, selection: SelectionConfig, device: torch.device | None = None) -> None:
        super().check(selection, device)
        if selection.encoder == "target" and selection.layer is not None and has_batchnorm(self.target):
            raise ValueError(
                "selection.layer: with encoder = target not for a backbone with BatchNorm, which would normalise "
                "finalists by one another; leave it out"
            )

    def pair_losses(
        self, crops: tuple[Tensor, ...], selection: SelectionConfig, random: RandomPairs | None = None
    ) -> Scores:
        """As every objective's; where the target alone scores, without images that train on a random pair."""
        if selection.encoder != "target":
            return super().pair_losses(crops, selection, random)
        self.check(selection)
        views_BNCHW = crops[0]
        device = views_BNCHW.device
        random = random or RandomPairs.none(len(views_BNCHW), device)
        if not len(random.others_S):
            nothing_BP = views_BNCHW.new_full((len(views_BNCHW), len(pairs(views_BNCHW.shape[1]))), torch.nan)
            return Scores(nothing_BP, rows_S=random.others_S)
        score = self._by_all_blocks if selection.layer is None else self._by_first_blocks
        with without_side_effects(self, selection.batchnorm == "running"), self.arithmetic(selection, device):
            scores = score(views_BNCHW, selection, random)
        reused = self.reuses_features(replace(selection, layer=None, finalists=None), device)
        return scores if reused else replace(scores, features_BND=None)

    def _by_all_blocks(self, views_BNCHW: Tensor, selection: SelectionConfig, random: RandomPairs) -> Scores:
        every = Views.all(random, views_BNCHW.shape[1])
        features_VD = self._run(self.target.features, views_BNCHW, every, selection)
        losses_SP = self._guess(self.correction, every.scored(features_VD), selection)
        features_BND = every.spread(features_VD)
        losses_BP = random.spread(losses_SP, torch.nan)
        return Scores(losses_BP, features_BND, judged_BND=features_BND, rows_S=random.others_S)

    def _by_first_blocks(self, views_BNCHW: Tensor, selection: SelectionConfig, random: RandomPairs) -> Scores:
        """Pairs of the finalists have losses by all blocks; others, by the first ones."""
        views, layer = views_BNCHW.shape[1], selection.layer
        assert layer is not None and self.begun_correction is not None
        every = Views.all(random, views)
        tokens_VTD = self._run(partial(self.target.begin, layer=layer), views_BNCHW, every, selection)
        begun_VD = summary(self.target.backbone, tokens_VTD)
        first_SP = self._guess(self.begun_correction, every.scored(begun_VD), selection)

        barred_P = same_policy(views, views_BNCHW.device) if selection.cross_policy else None
        count = selection.finalists or max(2, min(3, views - 1))
        numbers_SM = finalists(first_SP, views, count, selection.rule, barred_P)
        last, pairs_SQ = Views(random, numbers_SM, views), pairs_among(numbers_SM, views)
        features_VD = self.target.finish(tokens_VTD[every.place(numbers_SM)], layer)
        last_SQ = self._guess(self.correction, last.scored(features_VD), selection)

        losses_SP = first_SP.scatter(1, pairs_SQ, last_SQ)
        barred_SP = torch.ones_like(losses_SP, dtype=torch.bool).scatter(1, pairs_SQ, False)
        features_BND = last.spread(features_VD)
        return Scores(
            random.spread(losses_SP, torch.nan),
            features_BND,
            judged_BND=features_BND,
            begun_BND=every.spread(begun_VD),
            barred_BP=random.spread(barred_SP, False),
            rows_S=random.others_S,
        )

    def _run(
        self, part: Callable[[Tensor], Tensor], views_BNCHW: Tensor, views: Views, selection: SelectionConfig
    ) -> Tensor:
        """[V, …]: what a part of the target makes of some views' pixels. With BatchNorm in the backbone it depends on
        what other views are there: then all are run."""
        if has_batchnorm(self.target):
            return views.of(all_views(self.target, views_BNCHW, selection, part))
        return part(views.of(views_BNCHW))

    def _guess(self, correction: Correction, seen_SMD: Tensor, selection: SelectionConfig) -> Tensor:
        """[S, Q], fp32: losses of all pairs of views, from what was seen of them."""
        online, target = correction(seen_SMD)
        return self.pair_table({"online": online, "target": target}, selection).float()

    def queries_and_keys(self, features: dict[str, Tensor | None], selection: SelectionConfig) -> tuple[Tensor, Tensor]:
        """Unit queries and keys [N, B, D] of all views. Where the online encoder alone was run, its projections are the
        keys."""
        online, target = features["online"], features["target"]
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
        for correction, seen_B2D in ((self.correction, chosen.judged_B2D), (self.begun_correction, chosen.begun_B2D)):
            if correction is not None and seen_B2D is not None:
                correction.learn(seen_B2D[:, 0], features1, target1)
                correction.learn(seen_B2D[:, 1], features2, target2)
        return q1, q2, k1, k2

    def _target_features(self, chosen: Chosen) -> list[Tensor]:
        """[B, F] of the pair's first and second views: those that selection computed where it did."""
        if chosen.features_B2D is not None:
            return list(chosen.features_B2D.unbind(1))
        return [self.target.features(x_BCHW) for x_BCHW in chosen.crops[0].unbind(1)]

    def after_step(self) -> None:
        """Moves the target: θ_k ← m·θ_k + (1 − m)·θ_q, with m rising to 1 by a cosine."""
        follow(self.target, self.online, momentum_at(self.step, self.length.steps, self._momentum))
        for correction in self._corrections():
            correction.update()
        super().after_step()

    def skip_step(self) -> None:
        for correction in self._corrections():
            correction.skip()
        super().skip_step()

    def _corrections(self) -> list[Correction]:
        return [self.correction] if self.begun_correction is None else [self.correction, self.begun_correction]
