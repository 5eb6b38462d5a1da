"""What every objective offers the training loop.

Shape suffixes: B images, N views, P pairs, 3HW pixels, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from models.backbones import BackboneConfig, build_backbone
from models.blocks import begin, finish, first_blocks
from models.candidates import RandomPairs
from models.contrast import Contrast
from models.known import KnownOutputs, known_outputs
from models.momentum import target_of
from models.precision import Precision, arithmetic, check_format, resolved
from models.selection import Rule, SelectionConfig, audit, select, take_pair, without_side_effects

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
    """What selection learned about all views, without gradient. NaN in place of what it did not learn."""

    losses_BP: Tensor
    """Loss of every candidate pair of the competing views."""
    features_BND: Tensor | None = None
    """The target backbone's features of the views, where they are exactly what the loss would compute again."""
    known: KnownOutputs | None = None
    """What the online backbone's linear layers gave for the views, where the loss would compute it again."""
    judged_BND: Tensor | None = None
    """What the target's backbone made of the views, where features of both backbones were guessed from it."""
    begun_BND: Tensor | None = None
    """What its first blocks made of them, where features were guessed from that before."""
    barred_BP: Tensor | None = None
    """Pairs with a loss that is guessed from the first blocks alone: they do not compete."""
    rows_S: Tensor | None = None
    """Images that were scored; None = all."""
    local_BPL: Tensor | None = None
    """Multi-crop: for each pair, the numbers of the local views that go with it (its hardest ones)."""

    def best(self, rule: Rule, barred_P: Tensor | None = None) -> Tensor:
        """int64 [B]: the pair that each image's scores are for; see `select`."""
        if self.barred_BP is not None:
            barred_P = self.barred_BP if barred_P is None else self.barred_BP | barred_P
        return select(self.losses_BP, rule, barred_P)


@dataclass(frozen=True)
class Chosen:
    """What trains: the chosen pair's crops and what selection computed of them that the loss can use again."""

    crops: tuple[Tensor, ...]
    """[B, 2, 3, H, W]; multi-crop: then the local views [B, L, 3, h, w]."""
    features_B2D: Tensor | None = None
    """The target backbone's features."""
    known: tuple[list[Tensor], list[Tensor]] | None = None
    """Outputs of the online backbone's linear layers for the first and the second views."""
    judged_B2D: Tensor | None = None
    """What features of both backbones were guessed from."""
    begun_B2D: Tensor | None = None
    """What they were guessed from before."""
    views_BM: Tensor | None = None
    """Multi-crop: numbers of all chosen views, over all groups side by side; None where it is just the pair."""


class Encoder(nn.Module):
    """Backbone and heads: pixels → features → projection (→ prediction, where there is a predictor).

    `precision` is the backbone's own arithmetic, without gradient where it is not `same` as what surrounds it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: nn.Module,
        predictor: nn.Module | None = None,
        precision: Precision = "same",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.predictor = predictor
        self.precision: Precision = precision
        self._begin, self._finish = begin, finish

    def compile_backbone(self, *, parts: bool) -> None:
        """torch.compile of the backbone, and of `begin` and `finish` where `parts` says that they are used, in place.
        Numbers of images and sizes of crops have code of their own; number formats are chosen outside of it."""
        self.backbone.compile(dynamic=False)
        if parts:
            self._begin, self._finish = torch.compile(begin, dynamic=False), torch.compile(finish, dynamic=False)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """[B, D]: the last head's output, not normalised."""
        return self.head(self.features(x_B3HW))

    def features(self, x_B3HW: Tensor) -> Tensor:
        """[B, D]: what the backbone makes of pixels."""
        return self._computed(self.backbone, x_B3HW)

    def begin(self, x_B3HW: Tensor, layer: int) -> Tensor:
        """[B, T, D]: a ViT's tokens after `layer` blocks."""
        return self._computed(lambda x: self._begin(self.backbone, x, layer), x_B3HW)

    def finish(self, tokens_BTD: Tensor, layer: int) -> Tensor:
        """[B, D]: what a ViT's other blocks make of its tokens; together the same as `features`."""
        return self._computed(lambda tokens: self._finish(self.backbone, tokens, layer), tokens_BTD)

    def _computed(self, part: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        if resolved(self.precision, values.device) == "same":
            return part(values)
        with arithmetic(self.precision, values.device, self.backbone):
            computed = part(values)
        return computed if in_bf16(values.device) else computed.float()

    def head(self, features_BD: Tensor) -> Tensor:
        """What the heads make of backbone features."""
        return self.predict(self.projector(features_BD))

    def predict(self, projected_BD: Tensor) -> Tensor:
        """The predictor's output; the input where there is none."""
        return projected_BD if self.predictor is None else self.predictor(projected_BD)


def momentum_encoder(online: Encoder, config: BackboneConfig) -> Encoder:
    """The online encoder's copy without predictor, with the target's own drop path and arithmetic; no gradients."""
    backbone = build_backbone(config, config.target_drop_path)  # apart, because its drop path differs
    backbone.load_state_dict(online.backbone.state_dict())
    return Encoder(backbone.requires_grad_(False), target_of(online.projector), precision=config.target_precision)


class Objective(nn.Module):
    """A self-supervised objective that scores pairs of views and learns from the chosen ones.

    `online` learns by gradient; `target`, where there is one, follows it. `step` counts steps since the start of
    training. `state_dict` holds all of this, queues and centres included.

    A subclass computes `pair_table` from embeddings of all views, `loss` of the chosen pair, and what `after_step` adds
    to counting.
    """

    online: Encoder
    target: Encoder | None
    # MoCo, MoBY, BYOL and those without a target evaluate the online encoder; DINO and iBOT the target.
    keeps: ClassVar[Literal["online", "target"]] = "online"
    # Whether a target that scores by its first blocks goes on with some of the views.
    has_finalists: ClassVar[bool] = False

    def __init__(self, length: Length) -> None:
        super().__init__()
        self.target = None
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

    def check(self, selection: SelectionConfig, device: torch.device | None = None) -> None:
        """Says before training what scoring would say on a device, by default on the one where the objective is.

        Raises:
            ValueError: the selection asks for an encoder or layer that the objective does not have, or it or the target
                for a number format that the device does not have.
        """
        if selection.encoder == "target" and self.target is None:
            raise ValueError("selection.encoder: target asked of an objective without a target encoder; take online")
        if selection.finalists is not None and not self.has_finalists:
            raise ValueError("selection.finalists: only for MoBY, MoCo v3 and BYOL; leave it out")
        device = device or next(self.parameters()).device
        check_format("selection.precision", selection.precision, device, self.online.backbone)
        if self.target is not None:
            check_format("backbone.target_precision", self.target.precision, device, self.target.backbone)
        with first_blocks(self.online.backbone, selection.layer):
            pass

    def check_batch(self, images: int) -> None:
        """Says before training what the loss of `images` images of all ranks would say; by default nothing.

        Raises:
            ValueError: the objective wants more images at once.
        """

    def chance(self, images: int) -> float | None:
        """The loss of the coming step, of `images` images of all ranks at once, where embeddings tell nothing apart.
        None where the loss itself cannot tell: without negatives or clusters, embeddings that are all alike have the
        lowest loss of all."""
        return None

    def pair_losses(
        self, crops: tuple[Tensor, ...], selection: SelectionConfig, random: RandomPairs | None = None
    ) -> Scores:
        """Losses [B, P] of all pairs of crops[0] [B, N, 3, H, W], without gradient and without side effects.

        `random`: images of which only the given pair is needed; an objective may score them all the same, as here.

        Raises:
            ValueError: the selection asks for an encoder or layer that the objective does not have.
        """
        views_BNCHW = crops[0]
        device = views_BNCHW.device
        reused = self.reuses_features(selection, device)
        known = KnownOutputs(*views_BNCHW.shape[:2]) if self.reuses_outputs(selection, device) else None
        with without_side_effects(self, selection.batchnorm == "running"), self.arithmetic(selection, device):
            features = self.score_features(views_BNCHW, selection, known)
            losses_BP = self.pair_table(features, selection)
        return Scores(losses_BP.float(), features["target"] if reused else None, known)

    def score_features(
        self, views_BNCHW: Tensor, selection: SelectionConfig, known: KnownOutputs | None = None
    ) -> dict[str, Tensor | None]:
        """Backbone features [B, N, D] of all views from the online encoder, and from the target where it scores too.
        `known` collects what the online backbone's linear layers give."""
        self.check(selection)
        wanted = {"target": None if selection.encoder == "online-alone" else self.target, "online": self.online}
        found: dict[str, Tensor | None] = {}
        for name, encoder in wanted.items():
            if encoder is None:
                found[name] = None
            else:
                recording = known.record(encoder.backbone) if known and name == "online" else nullcontext()
                with first_blocks(encoder.backbone, selection.layer), recording:
                    found[name] = all_views(encoder, views_BNCHW, selection)
        return found

    def arithmetic(self, selection: SelectionConfig, device: torch.device) -> AbstractContextManager[None]:
        """The number format of scoring, for both backbones."""
        encoders = [encoder.backbone for encoder in (self.online, self.target) if encoder is not None]
        return arithmetic(selection.precision, device, *encoders)

    def reuses_features(self, selection: SelectionConfig, device: torch.device) -> bool:
        """Whether the target's features from scoring are by definition what the loss would compute."""
        if self.target is None or selection.encoder == "online-alone":
            return False
        return scores_as_trained(self.target, selection, device)

    def reuses_outputs(self, selection: SelectionConfig, device: torch.device) -> bool:
        """Whether the outputs of the online backbone's linear layers while scoring are what the loss would compute, and
        are to be kept. A compiled backbone has no layers that could be told, one that recomputes its activations is
        short of memory."""
        backbone = self.online.backbone
        if not selection.reuse or getattr(backbone, "grad_checkpointing", False):
            return False
        compiled = backbone._compiled_call_impl is not None  # pyright: ignore[reportPrivateUsage]
        return not compiled and scores_as_trained(self.online, selection, device)

    def audit(
        self, crops: tuple[Tensor, ...], choice_B: Tensor, selection: SelectionConfig, rows_S: Tensor | None = None
    ) -> Metrics:
        """How often a cheaper choice agrees with the full one, and its regret; see `selection.audit`. No side effects.

        `crops` are those that train, not smaller or recoloured ones that were scored; `rows_S` the images that were.
        """
        losses_BP = self.pair_losses(crops, selection.full).losses_BP
        if rows_S is not None:
            losses_BP, choice_B = losses_BP[rows_S], choice_B[rows_S]
        return audit(losses_BP, choice_B, selection)

    def pair_table(self, features: dict[str, Tensor | None], selection: SelectionConfig) -> Tensor:
        """[B, P] from the features of all views. What a subclass defines."""
        raise TypeError(f"{type(self).__name__} defines no pair_table")

    def take(self, crops: tuple[Tensor, ...], choice_B: Tensor, scores: Scores | None) -> Chosen:
        """The chosen pair's crops of every image, in one gather, and the features that the loss may use again."""
        pair = (take_pair(crops[0], choice_B), *crops[1:])
        if scores is None:
            return Chosen(pair)
        return Chosen(
            pair,
            None if scores.features_BND is None else take_pair(scores.features_BND, choice_B),
            None if scores.known is None else scores.known.take(choice_B),
            None if scores.judged_BND is None else take_pair(scores.judged_BND, choice_B),
            None if scores.begun_BND is None else take_pair(scores.begun_BND, choice_B),
        )

    def pair_features(self, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """The online backbone's features [B, D] of the pair's first and second views, with their graph."""
        first, second = (
            self._features(x_BCHW, None if chosen.known is None else chosen.known[number])
            for number, x_BCHW in enumerate(chosen.crops[0].unbind(1))
        )
        return first, second

    def _features(self, x_BCHW: Tensor, known: list[Tensor] | None) -> Tensor:
        with nullcontext() if known is None else known_outputs(self.online.backbone, known):
            return self.online.features(x_BCHW)

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """Scalar loss with its graph, and scalar metrics. What a subclass defines."""
        raise TypeError(f"{type(self).__name__} defines no loss")

    def keep_positives(self, *pairs: tuple[Tensor, Tensor]) -> None:
        """While watched, remembers the pairs of embeddings [B, D] of the same images whose directions a loss draws
        together, both ways: first views with second ones, second with first. Else forgets the last ones."""
        self.positives = [(a_BD.detach(), b_BD.detach()) for a_BD, b_BD in pairs] if self.watching else []

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
        return head(features_BND).transpose(0, 1)
    return head(features_BND.flatten(0, 1)).unflatten(0, features_BND.shape[:2]).transpose(0, 1)


def all_views(
    encoder: Encoder, views_BNCHW: Tensor, selection: SelectionConfig, part: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """[B, N, …]: features of all views, or what another `part` of the encoder makes of pixels, in one forward; in N,
    one view of all images at a time, where the backbone has BatchNorm and `batchnorm = view` asks for the composition
    of training."""
    part = part or encoder.features
    if selection.batchnorm == "view" and has_batchnorm(encoder):
        return torch.stack([part(views_BCHW) for views_BCHW in views_BNCHW.unbind(1)], 1)
    return part(views_BNCHW.flatten(0, 1)).unflatten(0, views_BNCHW.shape[:2])


def scores_as_trained(encoder: Encoder, selection: SelectionConfig, device: torch.device) -> bool:
    """Whether scoring makes of a view what training makes of it in this backbone.

    That is: the same views, layer and arithmetic (around this call is the training's), no drop path, and no BatchNorm,
    whose statistics would depend on which views are together. The heads, which have BatchNorm, run again. In int8 on a
    CPU, which views are together moves what is rounded to what, and nothing else.
    """
    if selection.resolution is not None or selection.layer is not None or selection.static_colour:
        return False
    precision = resolved(selection.precision, device)
    own = resolved(encoder.precision, device)
    same = precision in ("same", own) or (precision == "bf16" and in_bf16(device))
    return same and not has_batchnorm(encoder) and not has_drop(encoder)


def has_batchnorm(encoder: Encoder) -> bool:
    """Whether any part of the backbone normalises by batch statistics."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in encoder.backbone.modules())


def has_drop(encoder: Encoder) -> bool:
    """Whether any part of the backbone drops paths or units while training."""
    parts = encoder.backbone.modules()
    return any((isinstance(p, DropPath) and p.drop_prob) or (isinstance(p, nn.Dropout) and p.p > 0) for p in parts)


def in_bf16(device: torch.device) -> bool:
    """Whether what surrounds this computes in bf16."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


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
