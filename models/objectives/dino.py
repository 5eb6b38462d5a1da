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
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone, feature_width
from models.blocks import first_blocks
from models.candidates import RandomPairs
from models.correction import Correction
from models.distributed import gather
from models.momentum import follow, momentum_at
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
    momentum_encoder,
)
from models.selection import SelectionConfig, pair_index, take_pair, without_side_effects


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
    """What the target makes of the global views."""

    teacher_B2K: Tensor
    """The distributions that the online encoder has to predict."""
    keys_B2D: Tensor
    """Its embeddings before the last layer, for monitors."""
    features_B2D: Tensor
    """Its backbone's features."""


class DINOHead(nn.Module):
    """Three layers with GELU, rows scaled to length 1, then a layer whose rows have length 1."""

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
        self.frozen = False

    def forward(self, features: Tensor) -> Tensor:
        return self.bottleneck(features) @ self.last().T

    def bottleneck(self, features: Tensor) -> Tensor:
        """Rows of length 1 before the last layer."""
        return F.normalize(self.layers(features), dim=-1)

    def last(self) -> Tensor:
        """[K, bottleneck]: the last layer's rows of length 1."""
        last_KD = F.normalize(self.last_KD, dim=1)
        # Where frozen, zero gradients rather than none, which DistributedDataParallel would wait for.
        return last_KD.detach() + 0 * last_KD if self.frozen else last_KD


class DINO(Objective):
    """DINO."""

    target: Encoder  # pyright: ignore[reportIncompatibleVariableOverride]  # never None here
    keeps: ClassVar[Literal["online", "target"]] = "target"
    centre_K: Tensor

    def __init__(self, config: DINOConfig, backbone: BackboneConfig, length: Length) -> None:
        super().__init__(length)
        self.config = config
        model = build_backbone(backbone, backbone.drop_path)
        self.online = Encoder(model, DINOHead(feature_width(model), config))
        self.target = momentum_encoder(self.online, backbone)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.correction = Correction(feature_width(model), feature_width(model))
        self.register_buffer("centre_K", torch.zeros(config.outputs))
        self._pending: list[Tensor] = []

    def chance(self, images: int) -> float:
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

    def pair_losses(
        self, crops: tuple[Tensor, ...], selection: SelectionConfig, random: RandomPairs | None = None
    ) -> Scores:
        """Losses of all pairs of global views, each with the local views that are hardest for it. Where the target
        alone scores, features of both backbones are guessed, as in models/objectives/momentum.py."""
        device = crops[0].device
        reused, alone = self.reuses_features(selection, device), selection.encoder == "target"
        student = self.target if alone else self.online
        teacher = self.online if selection.encoder == "online-alone" else self.target
        scored = crops if self.config.local_views else crops[:1]
        with without_side_effects(self, selection.batchnorm == "running"), self.arithmetic(selection, device):
            with first_blocks(teacher.backbone, selection.layer):
                features_BGD = all_views(teacher, crops[0], selection)
            teacher_BGK = self.teach(teacher.head(self.correction(features_BGD)[1] if alone else features_BGD))
            parts = []
            for group, crops_BnCHW in enumerate(scored):
                if student is teacher and group == 0:
                    features = features_BGD
                else:
                    with first_blocks(student.backbone, selection.layer):
                        features = all_views(student, crops_BnCHW, selection)
                predicted = self.predict(self.online.head(self.correction(features)[0] if alone else features))
                parts.append(cross_entropies(teacher_BGK, predicted))
        table_BP, local_BPL = best_locals(
            torch.cat(parts, 2),
            self.config.local_views,
            easiest=selection.rule == "easiest",
            candidates=self.config.candidates,
            seed=self.step,
        )
        judged = features_BGD if alone else None
        return Scores(table_BP, features_BGD if reused else None, judged_BND=judged, local_BPL=local_BPL)

    def take(self, crops: tuple[Tensor, ...], choice_B: Tensor, scores: Scores | None) -> Chosen:
        """The chosen global pair with its hardest local views, or where nothing was scored, with the first ones."""
        rows_B1 = torch.arange(len(choice_B), device=choice_B.device)[:, None]
        pair_B2 = pair_index(crops[0].shape[1], choice_B.device)[choice_B]
        pair = take_pair(crops[0], choice_B)
        found = (None, None) if scores is None else (scores.features_BND, scores.judged_BND)
        features, judged = (None if values is None else take_pair(values, choice_B) for values in found)
        if len(crops) == 1 or self.config.local_views == 0:
            return Chosen((pair,), features, judged_B2D=judged, views_BM=pair_B2)
        if scores is None or scores.local_BPL is None:
            count = min(self.config.local_views, crops[1].shape[1])
            local_BL = torch.arange(count, device=choice_B.device).expand(len(choice_B), -1)
        else:
            local_BL = scores.local_BPL[rows_B1[:, 0], choice_B]
        views_BM = torch.cat([pair_B2, local_BL + crops[0].shape[1]], 1)
        return Chosen((pair, crops[1][rows_B1, local_BL]), features, judged_B2D=judged, views_BM=views_BM)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        taught = self.targets(chosen)
        cross_B2V = torch.cat([self.against_globals(taught, chosen), *self.against_locals(taught, chosen)], 2)
        return pair_loss(cross_B2V).mean(), {"teacher_entropy": entropy(taught.teacher_B2K)}

    @torch.no_grad()
    def targets(self, chosen: Chosen) -> Taught:
        """What the target makes of the global views, whose outputs go into the centre."""
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
        """[B, 2, 2]: cross entropies of the targets with what the online encoder predicts for the global views. Keeps
        what monitors look at, and what corrects the next guesses: of views that were seen whole, where that is told."""
        cross_B22, features_B2D, embedded_B2D = self._against(taught, chosen.crops[0])
        self.seen_features_BD = features_B2D[:, 0].detach()
        (q1, q2), (k1, k2) = embedded_B2D.unbind(1), taught.keys_B2D.unbind(1)
        self.keep_positives((q1, k2), (q2, k1))
        if chosen.judged_B2D is not None:
            judged, online, target = chosen.judged_B2D, features_B2D, taught.features_B2D
            counts = None if whole_B2 is None else whole_B2.flatten()
            self.correction.learn(judged.flatten(0, 1), online.flatten(0, 1), target.flatten(0, 1), counts)
        return cross_B22

    def against_locals(self, taught: Taught, chosen: Chosen) -> list[Tensor]:
        """[B, 2, n] for each group of local views: the same of them."""
        return [self._against(taught, crops_BnCHW)[0] for crops_BnCHW in chosen.crops[1:]]

    def _against(self, taught: Taught, crops_BnCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropies [B, 2, n], and the online encoder's features and embeddings [B, n, D] of a group of views."""
        head, shape = head_of(self.online), crops_BnCHW.shape[:2]
        head.frozen = self.epoch < self.config.freeze_epochs
        features = self.online.features(crops_BnCHW.flatten(0, 1))
        embedded = head.bottleneck(features)
        cross_B2n = cross_entropies(taught.teacher_B2K, self.predict(embedded @ head.last().T).unflatten(0, shape))
        return cross_B2n, features.unflatten(0, shape), embedded.unflatten(0, shape)

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
    there = local_BPL.shape[2]
    count = min(count, there)
    if count == 0:
        return own_BP / 2, None
    terms = 2 * (1 + count)
    if candidates == 0:
        top = local_BPL.topk(count, dim=2, largest=not easiest)
        return (own_BP + top.values.sum(2)) / terms, top.indices
    generator = torch.Generator(device=cross_BGV.device).manual_seed(seed)
    each = -(-candidates // own_BP.shape[1])
    shape = (*own_BP.shape, each, there)
    drawn_BPCL = torch.rand(shape, generator=generator, device=cross_BGV.device).topk(count, dim=3).indices
    values_BPC = local_BPL[:, :, None].expand(*shape).gather(3, drawn_BPCL).sum(3)
    best = values_BPC.min(2) if easiest else values_BPC.max(2)
    chosen_BPL = drawn_BPCL.gather(2, best.indices[..., None, None].expand(-1, -1, 1, count))[:, :, 0]
    return (own_BP + best.values) / terms, chosen_BPL
