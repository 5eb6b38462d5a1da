"""What every objective offers the training loop.

Shape suffixes: B images, N views, P pairs, 3HW pixels, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from models.backbones import check_layer, first_blocks
from models.contrast import Contrast
from models.correction import Correction
from models.heads import has_batchnorm
from models.precision import arithmetic, in_bf16, resolved
from models.selection import SelectionConfig, audit, take_pair, without_side_effects

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Length:
    """How long training lasts, for the schedules inside objectives."""

    steps: int
    steps_per_epoch: float

    @property
    def epochs(self) -> float:
        return self.steps / self.steps_per_epoch


@dataclass(frozen=True)
class Features:
    """Backbone features of all views, without gradient."""

    online_BND: Tensor
    """The online encoder's; predicted from the target's where the target alone scores."""
    target_BND: Tensor | None
    """The target's; None for an objective without a target."""


@dataclass(frozen=True)
class Scores:
    """Result of scoring all views, without gradient."""

    losses_BP: Tensor
    """Loss of every candidate pair of the competing views."""
    features_BND: Tensor | None = None
    """The target backbone's features, where the loss would compute exactly the same again."""
    scored_BND: Tensor | None = None
    """The target's features that the online encoder's were predicted from, where the target alone scored."""
    local_BPL: Tensor | None = None
    """Multi-crop: for each pair, the numbers of the local views that go with it (its hardest ones)."""
    mask_BNHW: Tensor | None = None
    """bool, on the host: the patches that were hidden from the online encoder, where masked views were scored."""


@dataclass(frozen=True)
class Chosen:
    """What trains: the crops of the chosen pair, and features of it from scoring that the loss uses again."""

    crops: tuple[Tensor, ...]
    """[B, 2, 3, H, W]; multi-crop: then the local views [B, L, 3, h, w]."""
    features_B2D: Tensor | None = None
    """The target backbone's features."""
    scored_B2D: Tensor | None = None
    """The target's features that the online encoder's were predicted from."""
    views_BM: Tensor | None = None
    """Multi-crop: numbers of all chosen views, over all groups side by side; None where it is just the pair."""
    mask_B2HW: Tensor | None = None
    """bool, on the host: the pair's masks, where it was scored with them; None = the loss draws its own."""


class Encoder(nn.Module):
    """Backbone and heads: pixels → features → projection (→ prediction, where there is a predictor)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """[B, D]: the last head's output, not normalised."""
        return self.head(self.features(x_B3HW))

    def features(self, x_B3HW: Tensor) -> Tensor:
        """[B, D]: the backbone's features of images."""
        return self.backbone(x_B3HW)

    def head(self, features_BD: Tensor) -> Tensor:
        """The heads' output for backbone features."""
        return self.predict(self.projector(features_BD))

    def predict(self, projected_BD: Tensor) -> Tensor:
        """The predictor's output; the input where there is none."""
        return projected_BD if self.predictor is None else self.predictor(projected_BD)


class Objective(nn.Module):
    """A self-supervised objective that scores pairs of views and learns from the chosen ones.

    `online` learns by gradient; `target`, where there is one, follows it. `step` counts steps since the start of
    training. `state_dict` holds all of this, queues and centres included.

    A subclass writes `pair_table` (losses of all pairs from the features of all views) and `loss` (of the chosen pair),
    and extends `after_step` where a step changes more than the parameters.
    """

    online: Encoder
    target: Encoder | None
    correction: Correction | None
    """Predicts the online encoder's features where the target alone scores."""
    # MoCo, MoBY, BYOL and those without a target evaluate the online encoder; DINO and iBOT the target.
    keeps: ClassVar[Literal["online", "target"]] = "online"

    def __init__(self, length: Length) -> None:
        super().__init__()
        self.target = None
        self.correction = None
        # Whether BatchNorm's statistics in the loss are of both views together, rather than of each by itself.
        self.joint_norm = False
        self.length = length
        self.step = 0
        # What monitors look at after a step: features of the images it trained on and, while `watching` is set, of the
        # newest loss the embeddings that it compares and its contrastive tasks, for models.probes.
        self.seen_features_BD: Tensor | None = None
        self.watching = False
        self.positives: list[tuple[Tensor, Tensor]] = []
        self.contrasts: list[Contrast] = []

    @property
    def epoch(self) -> float:
        """Epochs since the start of training."""
        return self.step / self.length.steps_per_epoch

    @property
    def backbone(self) -> nn.Module:
        """The backbone to be kept and evaluated, of the encoder that `keeps` names."""
        encoder = self.target if self.keeps == "target" else self.online
        assert encoder is not None
        return encoder.backbone

    def check(self, selection: SelectionConfig) -> None:
        """Checks before training whether the objective can score as configured.

        Raises:
            ValueError: the selection asks for an encoder or layer that the objective does not have.
        """
        if selection.encoder == "target" and self.target is None:
            raise ValueError("selection.encoder: target asked of an objective without a target encoder; take online")
        if selection.layer is not None:
            check_layer(self.online.backbone, selection.layer)

    def check_batch(self, images: int) -> None:
        """Checks before training whether `images` images of all ranks are enough.

        Raises:
            ValueError: BatchNorm, which has no statistics of one image, or the objective wants more images at once.
        """
        if images < 2 and has_batchnorm(self):
            raise ValueError(
                "batch: BatchNorm needs two images or more at once, and batch / accumulate is 1; give a larger batch "
                "or a smaller accumulate"
            )

    def chance(self, images: int, *, real: bool = False) -> float | None:
        """The loss of the coming step, of `images` images of all ranks at once, where embeddings tell nothing apart;
        with `real`, against the real negatives alone.
        None where the loss itself cannot tell: without negatives or clusters, embeddings that are all alike have the
        lowest loss of all."""
        return None

    def pair_losses(self, crops: tuple[Tensor, ...], selection: SelectionConfig) -> Scores:
        """Losses [B, P] of all pairs of crops[0] [B, N, 3, H, W], without gradient and without side effects.

        Raises:
            ValueError: the selection asks for an encoder or layer that the objective does not have.
        """
        self.check(selection)
        device = crops[0].device
        with without_side_effects(self, selection.batchnorm == "running"), arithmetic(selection.precision, device):
            features = self.score_features(crops[0], selection)
            losses_BP = self.pair_table(features, selection)
        return self.with_target(losses_BP, features.target_BND, selection, device)

    def score_features(self, views_BNCHW: Tensor, selection: SelectionConfig) -> Features:
        """Backbone features [B, N, D] of all views, by the encoders that score."""
        target_BND = None if self.target is None else all_views(self.target, views_BNCHW, selection)
        if selection.encoder == "target":
            assert target_BND is not None and self.correction is not None
            return Features(self.correction(target_BND), target_BND)
        return Features(all_views(self.online, views_BNCHW, selection), target_BND)

    def with_target(
        self,
        losses_BP: Tensor,
        target_BND: Tensor | None,
        selection: SelectionConfig,
        device: torch.device,
        local_BPL: Tensor | None = None,
    ) -> Scores:
        """The losses with the target's features that the loss or the correction uses again."""
        scored_BND = target_BND if selection.encoder == "target" else None
        features_BND = target_BND if self.reuses_features(selection, device) else None
        return Scores(losses_BP.float(), features_BND, scored_BND, local_BPL)

    def reuses_features(self, selection: SelectionConfig, device: torch.device) -> bool:
        """Whether the loss would compute exactly the target's features from scoring again: the same views, layer and
        number format, no drop path, and no BatchNorm, whose statistics depend on which views are together."""
        if self.target is None or selection.resolution is not None or selection.static_colour:
            return False
        same = resolved(selection.precision, device) == "same" or in_bf16(device)
        return (
            same and selection.layer is None and not has_batchnorm(self.target.backbone) and not has_drop(self.target)
        )

    def audit(self, crops: tuple[Tensor, ...], choice_B: Tensor, selection: SelectionConfig) -> Metrics:
        """How often a cheaper choice agrees with the full one, and its regret; see `selection.audit`. No side effects.

        `crops` are those that train, not smaller or recoloured ones that were scored.
        """
        return audit(self.pair_losses(crops, selection.full).losses_BP, choice_B, selection)

    def pair_table(self, features: Features, selection: SelectionConfig) -> Tensor:
        """[B, P]: losses of all pairs, from the features of all views. A subclass writes it."""
        raise TypeError(f"{type(self).__name__} defines no pair_table")

    def take(self, crops: tuple[Tensor, ...], choice_B: Tensor, scores: Scores | None) -> Chosen:
        """The chosen pair's crops of every image, in one gather, and the features that the loss may use again."""
        pair = (take_pair(crops[0], choice_B), *crops[1:])
        if scores is None:
            return Chosen(pair)
        return Chosen(pair, taken(scores.features_BND, choice_B), taken(scores.scored_BND, choice_B))

    def pair_features(self, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """The online backbone's features [B, D] of the pair's first and second views, with their graph."""
        first_BCHW, second_BCHW = chosen.crops[0].unbind(1)
        joint = self.joint_norm and has_batchnorm(self.online.backbone)
        return both_views(self.online.features, first_BCHW, second_BCHW, joint=joint)

    def pair_heads(self, features1_BD: Tensor, features2_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The online heads' outputs for the pair's features."""
        return both_views(self.online.head, features1_BD, features2_BD, joint=self.joint_norm)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Scalar loss with its graph, and scalar metrics. A subclass writes it."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def keep_positives(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """While watched, remembers the pairs of embeddings [B, D] of the same images whose directions a loss draws
        together, both ways: first views with second ones, second with first. Else forgets the last ones."""
        self.positives = [(a_BD.detach(), b_BD.detach()) for a_BD, b_BD in pairs] if self.watching else []

    def frozen(self) -> list[nn.Parameter]:
        """Parameters that do not learn at this step, though they will."""
        return []

    def before_step(self) -> None:
        """To be called before each optimizer step, with gradients averaged over ranks: what does not learn yet has no
        gradient then, and so no decay and no place in the optimizer's count of steps. Zeros would give it both."""
        for parameter in self.frozen():
            parameter.grad = None

    def after_step(self) -> None:
        """To be called after each optimizer step."""
        self.step += 1

    def skip_step(self) -> None:
        """To be called instead of `after_step` where the step was not finite: nothing of it is kept."""
        self.step += 1

    def get_extra_state(self) -> dict[str, Any]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def per_view(head: Callable[[Tensor], Tensor], features_BND: Tensor, selection: SelectionConfig) -> Tensor:
    """[N, B, D]: a head's output for all views; its BatchNorm sees one view of all images at a time, as in training,
    or with `batchnorm = joint` all views at once."""
    if selection.batchnorm == "view":
        return head(features_BND).transpose(0, 1)
    return head(features_BND.flatten(0, 1)).unflatten(0, features_BND.shape[:2]).transpose(0, 1)


def all_views(encoder: Encoder, views_BNCHW: Tensor, selection: SelectionConfig) -> Tensor:
    """[B, N, D]: backbone features of all views after the blocks that are scored, in one forward; one view of all
    images at a time, N forwards, where the backbone has BatchNorm and `batchnorm = view` asks for the statistics of
    training."""
    with first_blocks(encoder.backbone, selection.layer):
        if selection.batchnorm == "view" and has_batchnorm(encoder.backbone):
            return torch.stack([encoder.features(views_BCHW) for views_BCHW in views_BNCHW.unbind(1)], 1)
        return encoder.features(views_BNCHW.flatten(0, 1)).unflatten(0, views_BNCHW.shape[:2])


def both_views(run: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
    """What `run` gives for two batches: for both at once where BatchNorm's statistics are joint, else for each."""
    if not joint:
        return run(first), run(second)
    one, two = run(torch.cat([first, second])).tensor_split(2)
    return one, two


def taken(values_BND: Tensor | None, choice_B: Tensor) -> Tensor | None:
    """[B, 2, D] of the chosen pair; None where there are no values."""
    return None if values_BND is None else take_pair(values_BND, choice_B)


def has_drop(encoder: Encoder) -> bool:
    """Whether any part of the backbone drops paths or units while training."""
    parts = encoder.backbone.modules()
    return any((isinstance(p, DropPath) and p.drop_prob) or (isinstance(p, nn.Dropout) and p.p > 0) for p in parts)


def fp32(device: torch.device) -> AbstractContextManager[Any]:
    """fp32 arithmetic inside, whatever surrounds it: what is divided by a small temperature wants it."""
    return torch.autocast(device.type, enabled=False)


def products(a_NBD: Tensor, b_NBD: Tensor) -> Tensor:
    """[N, N, B]: of each image, the products of its rows in all views of a with its rows in all views of b, fp32."""
    with fp32(a_NBD.device):
        return torch.einsum("nbd,mbd->nmb", a_NBD.float(), b_NBD.float())


def check_positive(config: Any, *fields: str) -> None:
    """ValueError where a numeric field of a config is not above 0."""
    for field in fields:
        if getattr(config, field) <= 0:
            raise ValueError(f"objective.{field}: {getattr(config, field)} must be above 0; raise it")
