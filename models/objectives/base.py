"""What every objective offers the training loop.

Shape suffixes: B images, N views, P pairs, 3HW pixels, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.selection import SelectionConfig, first_blocks, take_pair, without_side_effects

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
class Scores:
    """What selection learned about all views, without gradient."""

    losses_BP: Tensor
    """Loss of every candidate pair of the competing views."""
    features_BND: Tensor | None = None
    """The target backbone's features of the views, where they are exactly what the loss would compute again."""
    local_BPL: Tensor | None = None
    """Multi-crop: for each pair, the numbers of the local views that go with it (its hardest ones)."""


@dataclass(frozen=True)
class Chosen:
    """What trains: the chosen pair's crops and, where selection computed them, the target's features."""

    crops: tuple[Tensor, ...]
    """[B, 2, 3, H, W]; multi-crop: then the local views [B, L, 3, h, w]."""
    features_B2D: Tensor | None = None
    views_BM: Tensor | None = None
    """Multi-crop: numbers of all chosen views, over all groups side by side; None where it is just the pair."""


class Encoder(nn.Module):
    """Backbone and heads: pixels → features → projection (→ prediction, where there is a predictor)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """[B, D]: the last head's output, not normalised."""
        return self.head(self.backbone(x_B3HW))

    def head(self, features_BD: Tensor) -> Tensor:
        """What the heads make of backbone features."""
        return self.predict(self.projector(features_BD))

    def predict(self, projected_BD: Tensor) -> Tensor:
        """The predictor's output; the input where there is none."""
        return projected_BD if self.predictor is None else self.predictor(projected_BD)


class Objective(nn.Module):
    """A self-supervised objective that scores pairs of views and learns from the chosen ones.

    `online` learns by gradient; `target`, where there is one, follows it. `step` counts steps since the start of
    training. `state_dict` holds all of this, queues and centres included.

    A subclass computes `pair_table` from embeddings of all views, `loss` of the chosen pair, and what `after_step` adds
    to counting.
    """

    online: Encoder
    target: Encoder | None

    def __init__(self, length: Length) -> None:
        super().__init__()
        self.target = None
        self.length = length
        self.step = 0
        # What monitors look at after a step: features and labels of the images it trained on.
        self.seen_features_BD: Tensor | None = None

    @property
    def epoch(self) -> float:
        """Epochs since the start of training."""
        return self.step / self.length.steps_per_epoch

    @property
    def backbone(self) -> nn.Module:
        """The encoder to be kept: the target's where there is one, else the online one's."""
        return (self.target or self.online).backbone

    def pair_losses(self, crops: tuple[Tensor, ...], selection: SelectionConfig) -> Scores:
        """Losses [B, P] of all pairs of crops[0] [B, N, 3, H, W], without gradient and without side effects.

        Raises:
            ValueError: the selection asks for an encoder or layer that the objective does not have.
        """
        views_BNCHW = crops[0]
        running = selection.batchnorm == "running"
        with without_side_effects(self, running), scoring_precision(selection, views_BNCHW):
            features = self.score_features(views_BNCHW, selection)
            losses_BP = self.pair_table(features, selection)
        return Scores(losses_BP.float(), features["target"] if self.reuses_features(selection) else None)

    def score_features(self, views_BNCHW: Tensor, selection: SelectionConfig) -> dict[str, Tensor | None]:
        """Backbone features [B, N, D] of all views from the encoders that scoring needs: `online`, `target`."""
        if selection.encoder == "target" and self.target is None:
            raise ValueError("selection.encoder: target asked of an objective without a target encoder; take online")
        wanted = {"target": self.target, "online": self.online if selection.encoder == "online" else None}
        flat = views_BNCHW.flatten(0, 1)
        found: dict[str, Tensor | None] = {}
        for name, encoder in wanted.items():
            if encoder is None:
                found[name] = None
            else:
                with first_blocks(encoder.backbone, selection.layer):
                    found[name] = encoder.backbone(flat).unflatten(0, views_BNCHW.shape[:2])
        return found

    def reuses_features(self, selection: SelectionConfig) -> bool:
        """Whether the target's features from scoring are what the loss would compute: same views, layer, arithmetic,
        and no BatchNorm in the backbone, whose statistics would depend on which views are together."""
        same = selection.resolution is None and selection.layer is None and not selection.static_colour
        same = same and selection.precision == "same"
        return same and self.target is not None and not has_batchnorm(self.target.backbone)

    def pair_table(self, features: dict[str, Tensor | None], selection: SelectionConfig) -> Tensor:
        """[B, P] from the features of all views. What a subclass defines."""
        raise TypeError(f"{type(self).__name__} defines no pair_table")

    def take(self, crops: tuple[Tensor, ...], choice_B: Tensor, scores: Scores | None) -> Chosen:
        """The chosen pair's crops of every image, in one gather, and the features that the loss may use again."""
        reused = scores.features_BND if scores is not None else None
        return Chosen(
            (take_pair(crops[0], choice_B), *crops[1:]),
            None if reused is None else take_pair(reused, choice_B),
        )

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Scalar loss with its graph, and scalar metrics. What a subclass defines."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def after_step(self) -> None:
        """To be called after each optimizer step."""
        self.step += 1

    def skip_step(self) -> None:
        """To be called instead where the step was not finite: nothing of it is kept."""
        self.step += 1

    def get_extra_state(self) -> dict[str, Any]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def per_view(head: Callable[[Tensor], Tensor], features_BND: Tensor, selection: SelectionConfig) -> Tensor:
    """[N, B, D]: a head's output for all views; its BatchNorm sees one view of all images at a time, as in training,
    or with `batchnorm = joint` all views at once."""
    if selection.batchnorm == "view":
        return torch.stack([head(features_BD) for features_BD in features_BND.unbind(1)])
    return head(features_BND.flatten(0, 1)).unflatten(0, features_BND.shape[:2]).transpose(0, 1)


def has_batchnorm(module: nn.Module) -> bool:
    """Whether any part normalises by batch statistics."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def scoring_precision(selection: SelectionConfig, like: Tensor) -> torch.autocast:
    """bf16 arithmetic where the selection asks for it, else what surrounds it."""
    wanted = selection.precision == "bf16"
    kind = like.device.type
    return torch.autocast(kind, torch.bfloat16, enabled=wanted or torch.is_autocast_enabled(kind))


def check_positive(config: Any, *fields: str) -> None:
    """ValueError where a numeric field of a config is not above 0."""
    for field in fields:
        if getattr(config, field) <= 0:
            raise ValueError(f"objective.{field}: {getattr(config, field)} must be above 0")
