"""DINO (Caron et al. 2021, algorithm 1) with multi-crop, and HVP's choice among more crops than train.

    t_i = softmax((f_t(x_i) − centre) / τ_t)     # global views, no gradient
    s_v = log softmax(f_s(x_v) / τ_s)            # global and local views
    loss = mean over i ≠ v of −t_i · s_v
    step; f_t ← m f_t + (1 − m) f_s; centre ← mean of f_t(x)

The loss is a sum over crops, so its maximum over all choices of 2 of G global and l of L local views is exact: for each
pair of global views the l local views with the largest cross entropy against that pair (HVP samples 128 candidates).

Shape suffixes: B images, G global views, L local views of which l train, V = G + L, P pairs of global views, K outputs.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.correction import Correction
from models.distributed import gather
from models.objectives.base import (
    Chosen,
    Encoder,
    Length,
    Metrics,
    Objective,
    Scores,
    all_views,
    check_positive,
    fp32,
)
from models.objectives.momentum import follow, momentum_at, momentum_encoder
from models.precision import arithmetic
from models.selection import SelectionConfig, pair_index, without_side_effects


@dataclass(frozen=True)
class DINOConfig:
    """DINO."""

    outputs: int = 65_536
    """K: width of the last layer."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    bottleneck: int = 256
    """Width before the last layer, where rows are scaled to length 1."""
    student_temperature: float = 0.1
    """τ_s."""
    teacher_temperature: float = 0.04
    """τ_t after its warm-up."""
    warmup_teacher_temperature: float = 0.04
    """τ_t at the start."""
    warmup_teacher_epochs: float = 0.0
    """Epochs in which τ_t rises linearly."""
    momentum: float = 0.996
    """Momentum of the target at the start; reaches 1 at the end by a cosine."""
    centre_momentum: float = 0.9
    """Momentum of the centre."""
    freeze_epochs: float = 1.0
    """Epochs in which the last layer does not learn."""
    local_views: int = 8
    """l: local views that train; with more in the stream (views.local_views) the hardest are chosen."""
    norm_last_layer: bool = True
    """Rows of the last layer have length 1; false = they have lengths of their own, which are learned from 1 on."""
    candidates: int = 0
    """Score only so many random choices per image, as HVP does (128); 0 = the exact maximum."""

    def __post_init__(self) -> None:
        check_positive(self, "outputs", "hidden", "bottleneck", "student_temperature", "teacher_temperature")
        check_positive(self, "warmup_teacher_temperature")
        for field in ("momentum", "centre_momentum"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(
                    f"objective.{field}: {getattr(self, field)} must lie between 0 and 1; the paper's are 0.996 and 0.9"
                )
        for field in ("warmup_teacher_epochs", "freeze_epochs", "local_views", "candidates"):
            if getattr(self, field) < 0:
                raise ValueError(f"objective.{field}: {getattr(self, field)} must be 0 or above; raise it")


@dataclass(frozen=True)
class Taught:
    """The target's outputs for the global views."""

    teacher_B2K: Tensor
    """The distributions that the online encoder has to predict."""
    keys_B2D: Tensor
    """Its embeddings before the last layer, for monitors."""
    features_B2D: Tensor
    """Its backbone's features."""


class DINOHead(nn.Module):
    """Three layers with GELU, rows scaled to length 1, a last layer with rows of length 1 or of learned lengths."""

    def __init__(self, features: int, config: DINOConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        # As long as a linear layer's rows: their length decides how fast Adam's steps turn them.
        self.last_KD = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(config.outputs, config.bottleneck), 5**0.5))
        self.lengths_K1 = None if config.norm_last_layer else nn.Parameter(torch.ones(config.outputs, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.bottleneck(features) @ self.last().T

    def bottleneck(self, features: Tensor) -> Tensor:
        """Rows of length 1 before the last layer."""
        return F.normalize(self.layers(features), dim=-1)

    def last(self) -> Tensor:
        """[K, bottleneck]: the last layer."""
        unit_KD = F.normalize(self.last_KD, dim=1)
        return unit_KD if self.lengths_K1 is None else unit_KD * self.lengths_K1


class DINO(Objective):
    """DINO."""

    target: Encoder  # pyright: ignore[reportIncompatibleVariableOverride]  # never None here
    correction: Correction  # pyright: ignore[reportIncompatibleVariableOverride]  # nor this
    keeps: ClassVar[Literal["online", "target"]] = "target"
    centre_K: Tensor

    def __init__(self, config: DINOConfig, backbone: BackboneConfig, length: Length) -> None:
        super().__init__(length)
        self.config = config
        model = build_backbone(backbone, backbone.drop_path)
        self.online = Encoder(model, DINOHead(feature_width(model), config))
        self.target = momentum_encoder(self.online, backbone)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.correction = Correction(feature_width(model))  # pyright: ignore[reportIncompatibleVariableOverride]
        self.register_buffer("centre_K", torch.zeros(config.outputs))
        self._pending: list[Tensor] = []

    def chance(self, images: int, *, real: bool = False) -> float:
        return math.log(self.config.outputs)

    def warmed(self, temperature: float) -> float:
        """τ_t at this step, where it ends at `temperature`."""
        warmup = self.config.warmup_teacher_epochs
        share = min(1.0, self.epoch / warmup) if warmup > 0 else 1.0
        first = self.config.warmup_teacher_temperature
        return first + (temperature - first) * share

    def teach(self, t: Tensor) -> Tensor:
        """Target outputs → the distributions that the online encoder has to predict, fp32."""
        return ((t.float() - self.centre_K) / self.warmed(self.config.teacher_temperature)).softmax(-1)

    def predict(self, s: Tensor) -> Tensor:
        """Online outputs → log probabilities, fp32."""
        return (s.float() / self.config.student_temperature).log_softmax(-1)

    def pair_losses(self, crops: tuple[Tensor, ...], selection: SelectionConfig) -> Scores:
        """Losses of all pairs of global views, each with the local views that are hardest for it. Where the target
        alone scores, the online encoder's features of all views are predicted from it, as in `Objective`."""
        self.check(selection)
        device, alone = crops[0].device, selection.encoder == "target"
        local_views = crops[1:] if self.config.local_views else ()
        with without_side_effects(self, selection.batchnorm == "running"), arithmetic(selection.precision, device):
            features = self.score_features(crops[0], selection)
            assert features.target_BND is not None
            teacher_BGK = self.teach(self.target.head(features.target_BND))
            student = self.target if alone else self.online
            locals_BND = [all_views(student, views_BNCHW, selection) for views_BNCHW in local_views]
            if alone:
                locals_BND = [self.correction(features_BND) for features_BND in locals_BND]
            cross_BGV = torch.cat(
                [
                    cross_entropies(teacher_BGK, self.predict(self.online.head(features_BND)))
                    for features_BND in (features.online_BND, *locals_BND)
                ],
                2,
            )
        table_BP, local_BPL = best_locals(
            cross_BGV,
            self.config.local_views,
            easiest=selection.rule == "easiest",
            candidates=self.config.candidates,
            seed=self.step,
        )
        return self.with_target(table_BP, features.target_BND, selection, device, local_BPL)

    def take(self, crops: tuple[Tensor, ...], choice_B: Tensor, scores: Scores | None) -> Chosen:
        """The chosen global pair with its hardest local views, or where nothing was scored, with the first ones."""
        chosen = super().take(crops[:1], choice_B, scores)
        pair_B2 = pair_index(crops[0].shape[1], choice_B.device)[choice_B]
        if len(crops) == 1 or self.config.local_views == 0:
            return replace(chosen, views_BM=pair_B2)
        rows_B1 = torch.arange(len(choice_B), device=choice_B.device)[:, None]
        if scores is None or scores.local_BPL is None:
            count = min(self.config.local_views, crops[1].shape[1])
            local_BL = torch.arange(count, device=choice_B.device).expand(len(choice_B), -1)
        else:
            local_BL = scores.local_BPL[rows_B1[:, 0], choice_B]
        views_BM = torch.cat([pair_B2, local_BL + crops[0].shape[1]], 1)
        return replace(chosen, crops=(*chosen.crops, crops[1][rows_B1, local_BL]), views_BM=views_BM)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        taught = self.targets(chosen)
        cross_B2V = torch.cat([self.against_globals(taught, chosen), *self.against_locals(taught, chosen)], 2)
        return pair_loss(cross_B2V).mean(), {"teacher_entropy": entropy(taught.teacher_B2K)}

    @torch.no_grad()
    def targets(self, chosen: Chosen) -> Taught:
        """The target's outputs for the global views; their mean goes into the centre."""
        globals_B2CHW = chosen.crops[0]
        features_B2D = chosen.features_B2D
        if features_B2D is None:
            features_B2D = self.target.features(globals_B2CHW.flatten(0, 1)).unflatten(0, globals_B2CHW.shape[:2])
        head = head_of(self.target)
        keys_B2D = head.bottleneck(features_B2D)
        outputs_B2K = keys_B2D @ head.last().T
        self._pending.append(outputs_B2K.float().mean((0, 1)))
        return Taught(self.teach(outputs_B2K), keys_B2D, features_B2D)

    def against_globals(self, taught: Taught, chosen: Chosen, whole_B2: Tensor | None = None) -> Tensor:
        """[B, 2, 2]: cross entropies of the targets with the online encoder's predictions for the global views. Keeps
        the features and embeddings that monitors read, and teaches the correction: from the views without masks, where
        `whole_B2` marks them."""
        cross_B22, features_B2D, embedded_B2D = self._against(taught, chosen.crops[0])
        self.seen_features_BD = features_B2D[:, 0].detach()
        (q1, q2), (k1, k2) = embedded_B2D.unbind(1), taught.keys_B2D.unbind(1)
        self.keep_positives((q1, k2), (q2, k1))
        if chosen.scored_B2D is not None:
            counts = None if whole_B2 is None else whole_B2.flatten()
            self.correction.observe(chosen.scored_B2D.flatten(0, 1), features_B2D.flatten(0, 1), counts)
        return cross_B22

    def against_locals(self, taught: Taught, chosen: Chosen) -> list[Tensor]:
        """[B, 2, n] for each group of local views: cross entropies of the targets with their predictions."""
        return [self._against(taught, crops_BnCHW)[0] for crops_BnCHW in chosen.crops[1:]]

    def _against(self, taught: Taught, crops_BnCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropies [B, 2, n], and the online encoder's features and embeddings [B, n, D] of a group of views."""
        head, shape = head_of(self.online), crops_BnCHW.shape[:2]
        features = self.online.features(crops_BnCHW.flatten(0, 1))
        embedded = head.bottleneck(features)
        cross_B2n = cross_entropies(taught.teacher_B2K, self.predict(embedded @ head.last().T).unflatten(0, shape))
        return cross_B2n, features.unflatten(0, shape), embedded.unflatten(0, shape)

    def frozen(self) -> list[nn.Parameter]:
        head = head_of(self.online)
        last = [part for part in (head.last_KD, head.lengths_K1) if part is not None]
        return last if self.epoch < self.config.freeze_epochs else []

    def after_step(self) -> None:
        """Moves target and centre."""
        follow(self.target, self.online, momentum_at(self.step, self.length.steps, self.config.momentum))
        mean_K = gather(torch.stack(self._pending).mean(0, keepdim=True)).mean(0)
        self._pending.clear()
        self.centre_K.lerp_(mean_K, 1 - self.config.centre_momentum)
        self.correction.update()
        super().after_step()

    def skip_step(self) -> None:
        self._pending.clear()
        self.correction.skip()
        super().skip_step()


def head_of(encoder: Encoder) -> DINOHead:
    """The encoder's head, which has no predictor behind it."""
    assert isinstance(encoder.projector, DINOHead) and encoder.predictor is None
    return encoder.projector


def entropy(distributions: Tensor) -> Tensor:
    """Mean entropy (nats) of distributions along the last axis."""
    return -(distributions * distributions.clamp_min(1e-12).log()).sum(-1).mean()


def pair_loss(cross_B2V: Tensor) -> Tensor:
    """[B]: mean of the cross entropies of the first two views' targets with all views but themselves."""
    views = cross_B2V.shape[2]
    total = cross_B2V.sum((1, 2)) - cross_B2V[:, 0, 0] - cross_B2V[:, 1, 1]
    return total / (2 * (views - 1))


def cross_entropies(teacher_BGK: Tensor, log_student_BVK: Tensor) -> Tensor:
    """[B, G, V]: of each image, every target distribution against every prediction, fp32."""
    with fp32(teacher_BGK.device):
        return -torch.einsum("bgk,bvk->bgv", teacher_BGK, log_student_BVK)


def best_locals(
    cross_BGV: Tensor, count: int, *, easiest: bool = False, candidates: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Losses [B, P] of every pair of global views with its `count` hardest local views, and those views' numbers.

    `easiest` takes the easiest ones instead. `candidates` > 0 scores that many random choices per image, as many of
    each pair (HVP, section 4.1, draws 128 of all); drawn from a generator of its own, so that torch's global one is
    untouched.
    """
    global_views = cross_BGV.shape[1]
    a, b = pair_index(global_views, cross_BGV.device).T
    own_BP = cross_BGV[:, a, b] + cross_BGV[:, b, a]
    local_BPL = (cross_BGV[:, a] + cross_BGV[:, b])[:, :, global_views:]
    locals_ = local_BPL.shape[2]
    count = min(count, locals_)
    if count == 0:
        return own_BP / 2, None
    terms = 2 * (1 + count)
    if candidates == 0:
        top = local_BPL.topk(count, dim=2, largest=not easiest)
        return (own_BP + top.values.sum(2)) / terms, top.indices
    generator = torch.Generator(device=cross_BGV.device).manual_seed(seed)
    each = -(-candidates // own_BP.shape[1])
    shape = (*own_BP.shape, each, locals_)
    drawn_BPCL = torch.rand(shape, generator=generator, device=cross_BGV.device).topk(count, dim=3).indices
    values_BPC = local_BPL[:, :, None].expand(*shape).gather(3, drawn_BPCL).sum(3)
    best = values_BPC.min(2) if easiest else values_BPC.max(2)
    chosen_BPL = drawn_BPCL.gather(2, best.indices[..., None, None].expand(-1, -1, 1, count))[:, :, 0]
    return (own_BP + best.values) / terms, chosen_BPL
