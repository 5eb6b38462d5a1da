"""iBOT (Zhou et al. 2022, algorithm 1): DINO's loss of class tokens, and the same for masked patches.

    t_i, u_i = f_t(x_i)                       # class and patch tokens of global views, through one head, no gradient
    s_i, w_i = f_s(masked x_i)                # the online encoder sees a mask token in place of the masked patches
    loss = DINO(t, s) + mean over masked patches of −softmax((u_i − centre′) / τ_t) · log softmax(w_i / τ_s)
    step; f_t ← m f_t + (1 − m) f_s; both centres

Views are chosen by the class tokens' part and without masks: a pair's patches are predicted within each view, so they
say little about the pair, and masks would make the choice depend on chance. HVP's code scores masked views, patches
included, and trains with the same masks: `masked_scores`. Local views, where there are some, are chosen as in DINO.

Shape suffixes: B images, N views of an image, P pairs, V views of all images side by side, T patches in rows of H × W,
M masked ones, D width, K outputs, R blocks.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.backbones import BackboneConfig
from models.distributed import gather
from models.heads import has_batchnorm
from models.objectives.base import Chosen, Features, Length, Metrics, Scores, fp32
from models.objectives.dino import DINO, DINOConfig, entropy, head_of, pair_loss
from models.selection import SelectionConfig, pair_index, take_pair


@dataclass(frozen=True)
class IBOTConfig(DINOConfig):
    """iBOT."""

    outputs: int = 8192
    """K: width of the last layer, which class and patch tokens share."""
    teacher_temperature: float = 0.07
    """τ_t of class tokens after its warm-up."""
    warmup_teacher_epochs: float = 30.0
    """Epochs in which τ_t rises linearly."""
    local_views: int = 10
    """l: local views that train; with more in the stream (views.local_views) the hardest are chosen."""
    patch_temperature: float = 0.07
    """τ_t of patch tokens after its warm-up."""
    patch_weight: float = 1.0
    """Weight of the masked patches' part of the loss."""
    mask_probability: float = 0.5
    """Share of global views in which patches are masked (0 to 1)."""
    mask_share: float = 0.3
    """Mean of the most that is masked of a masked view (share of its patches, 0 to 1); blocks may not fit."""
    mask_variation: float = 0.2
    """Largest deviation from that share, which is drawn uniformly for each view."""
    masked_scores: bool = False
    """Score pairs as HVP's code does: by the whole loss of masked views, patches included; the chosen pair trains with
    the same masks, for which the step waits once more for the device. HVP lets only views of different policies compete
    (selection.cross_policy). false = by the class tokens of whole views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_temperature <= 0:
            raise ValueError(f"objective.patch_temperature: {self.patch_temperature} must be above 0; raise it")
        if self.patch_weight < 0:
            raise ValueError(f"objective.patch_weight: {self.patch_weight} must be 0 or above; raise it")
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"objective.mask_probability: {self.mask_probability} must lie between 0 and 1")
        if not 0 <= self.mask_variation <= self.mask_share <= 1 - self.mask_variation:
            raise ValueError(
                f"objective.mask_share: {self.mask_share} ± {self.mask_variation} leaves 0 to 1; lower mask_variation"
            )


class Tap:
    """Hooks in a ViT: while open, masked patches are replaced by a token and the last layer's tokens are noted.

    The hooks stay where they are, so that a compiled backbone has them too.
    """

    def __init__(self, backbone: VisionTransformer, token_D: nn.Parameter | None = None) -> None:
        self.prefix = backbone.num_prefix_tokens
        self.token_D = token_D
        self.mask_VHW: Tensor | None = None
        self.tokens: Tensor | None = None
        self.open = False
        backbone.patch_embed.register_forward_hook(self._substitute)
        backbone.norm.register_forward_hook(self._note)

    @contextmanager
    def noting(self, mask_VHW: Tensor | None = None) -> Iterator[None]:
        """Inside, a forward replaces the masked patches by the token, and `patches` are its patch tokens."""
        self.open, self.mask_VHW = True, mask_VHW
        try:
            yield
        finally:
            self.open, self.mask_VHW, self.tokens = False, None, None

    @property
    def patches(self) -> Tensor:
        """[V, T, D]: the newest forward's patch tokens, rows first."""
        assert self.tokens is not None
        return self.tokens[:, self.prefix :]

    def _substitute(self, module: nn.Module, inputs: Any, embedded_VHWD: Tensor) -> Tensor:
        if self.token_D is None or self.mask_VHW is None:
            return embedded_VHWD
        return torch.where(self.mask_VHW[..., None], self.token_D.to(embedded_VHWD.dtype), embedded_VHWD)

    def _note(self, module: nn.Module, inputs: Any, tokens: Tensor) -> None:
        if self.open:
            self.tokens = tokens


class IBOT(DINO):
    """iBOT."""

    config: IBOTConfig
    patch_centre_K: Tensor

    def __init__(self, config: IBOTConfig, backbone: BackboneConfig, length: Length) -> None:
        super().__init__(config, backbone, length)
        online, target = self.online.backbone, self.target.backbone
        for model in (online, target):
            if not isinstance(model, VisionTransformer) or model.global_pool != "token":
                raise ValueError(
                    f"backbone.name: iBOT masks patches of a ViT with a class token, and {backbone.name} is none as "
                    f"configured; take a ViT and leave backbone.pool at token"
                )
        assert isinstance(online, VisionTransformer) and isinstance(target, VisionTransformer)
        assert isinstance(online.patch_embed, PatchEmbed)
        self.patch_sides = int(online.patch_embed.patch_size[0]), int(online.patch_embed.patch_size[1])
        self.mask_token_D = nn.Parameter(torch.zeros(online.embed_dim))
        self.register_buffer("patch_centre_K", torch.zeros(config.outputs))
        self._online_tap, self._target_tap = Tap(online, self.mask_token_D), Tap(target)
        self._pending_patches: list[Tensor] = []
        self._scored: tuple[Tensor, Tensor] | None = None

    def check(self, selection: SelectionConfig) -> None:
        super().check(selection)
        if not self.config.masked_scores:
            return
        refused = {
            "selection.encoder: target": selection.encoder == "target",
            "selection.resolution: smaller views": selection.resolution is not None,
            "selection.audit_every: a comparison with other masks": selection.audit_every > 0,
            "backbone.batchnorm_mlp: statistics of each view": has_batchnorm(self.online.backbone),
        }
        for what, asked in refused.items():
            if asked:
                raise ValueError(f"{what} cannot go with objective.masked_scores; leave one of them out")

    def reuses_features(self, selection: SelectionConfig, device: torch.device) -> bool:
        """Never: the loss needs patch tokens too, and scoring does not keep them."""
        return False

    def chance(self, images: int, *, real: bool = False) -> float:
        """On average over masks: a view without any adds nothing to the patches' part."""
        return super().chance(images, real=real) * (1 + self.config.patch_weight * self.config.mask_probability)

    def pair_losses(self, crops: tuple[Tensor, ...], selection: SelectionConfig) -> Scores:
        """As DINO's; with `masked_scores` of masked views, with the patches' part of both views, and with the masks,
        which are drawn from torch's global generator."""
        if not self.config.masked_scores:
            return super().pair_losses(crops, selection)
        scores = super().pair_losses(crops, selection)
        assert self._scored is not None
        (patch_BN, mask_BNHW), self._scored = self._scored, None
        a, b = pair_index(patch_BN.shape[1], patch_BN.device).T
        patch_BP = (patch_BN[:, a] + patch_BN[:, b]) / 2
        return replace(scores, losses_BP=scores.losses_BP + self.config.patch_weight * patch_BP, mask_BNHW=mask_BNHW)

    def score_features(self, views_BNCHW: Tensor, selection: SelectionConfig) -> Features:
        """As `Objective`'s; with `masked_scores` the online encoder's are of masked views, whose masks and patch losses
        are kept for `pair_losses`."""
        if not self.config.masked_scores:
            return super().score_features(views_BNCHW, selection)
        device, shape = views_BNCHW.device, views_BNCHW.shape[:2]
        mask_VHW = self.masks(views_BNCHW)
        masked_M, weight_M = masked_patches(mask_VHW, device)
        with self._target_tap.noting(), self._online_tap.noting(mask_VHW.to(device, non_blocking=True)):
            features = super().score_features(views_BNCHW, selection)
            taught_MK = self.teach_patches(head_of(self.target)(self._target_tap.patches.flatten(0, 1)[masked_M]))
            loss_M = -self.patch_products(taught_MK, self._online_tap.patches.flatten(0, 1)[masked_M]) * weight_M
        view_M = masked_M // mask_VHW[0].numel()
        patch_BN = loss_M.new_zeros(len(mask_VHW)).index_add_(0, view_M, loss_M).view(shape)
        self._scored = patch_BN, mask_VHW.unflatten(0, shape)
        return features

    def take(self, crops: tuple[Tensor, ...], choice_B: Tensor, scores: Scores | None) -> Chosen:
        """As DINO's, with the masks that the pair was scored with."""
        chosen = super().take(crops, choice_B, scores)
        if scores is None or scores.mask_BNHW is None:
            return chosen
        return replace(chosen, mask_B2HW=take_pair(scores.mask_BNHW, choice_B.cpu()))

    def loss(self, chosen: Chosen, labels_B: Tensor | None = None) -> tuple[Tensor, Metrics]:
        mask_VHW = self.masks(chosen.crops[0]) if chosen.mask_B2HW is None else chosen.mask_B2HW.flatten(0, 1)
        device = chosen.crops[0].device
        masked_M, weight_M = masked_patches(mask_VHW, device)
        whole_B2 = (~mask_VHW.any(2).any(1)).view(-1, 2).to(device, non_blocking=True)
        with self._target_tap.noting():
            taught = self.targets(chosen)
            taught_MK = self.patch_targets(self._target_tap.patches, masked_M)
        locals_ = self.against_locals(taught, chosen)
        with self._online_tap.noting(mask_VHW.to(device, non_blocking=True)):
            globals_B22 = self.against_globals(taught, chosen, whole_B2)
            patches_MD = self._online_tap.patches.flatten(0, 1)[masked_M]
        # A view's masked patches count as one, and a view without any as nothing (equation 2 there).
        patch_loss = -(self.patch_products(taught_MK, patches_MD) * weight_M).sum() / len(mask_VHW)
        loss = pair_loss(torch.cat([globals_B22, *locals_], 2)).mean() + self.config.patch_weight * patch_loss
        return loss, {"teacher_entropy": entropy(taught.teacher_B2K), "patch_loss": patch_loss.detach()}

    def masks(self, globals_B2CHW: Tensor) -> Tensor:
        """bool [V, H, W] on the host: True where a patch is hidden from the online encoder."""
        height, width = (side // patch for side, patch in zip(globals_B2CHW.shape[3:], self.patch_sides, strict=True))
        views = globals_B2CHW.shape[0] * globals_B2CHW.shape[1]
        config = self.config
        low, high = config.mask_share - config.mask_variation, config.mask_share + config.mask_variation
        share_V = (low + (high - low) * torch.rand(views)) * (torch.rand(views) < config.mask_probability)
        return block_masks(share_V * height * width, height, width)

    @torch.no_grad()
    def patch_targets(self, patches_VTD: Tensor, masked_M: Tensor) -> Tensor:
        """[M, K]: the target's distributions for the masked patches; the outputs of all patches go into the centre."""
        head = head_of(self.target)
        bottleneck = head.bottleneck(patches_VTD.flatten(0, 1))
        last_KD = head.last()
        # The last layer is linear: the mean of its outputs is its output for the mean.
        with fp32(patches_VTD.device):
            self._pending_patches.append(last_KD.float() @ bottleneck.float().mean(0))
        return self.teach_patches(bottleneck[masked_M] @ last_KD.T)

    def teach_patches(self, outputs_MK: Tensor) -> Tensor:
        """The target's outputs for masked patches → the distributions to predict, fp32."""
        outputs_MK = outputs_MK.float() - self.patch_centre_K
        return (outputs_MK / self.warmed(self.config.patch_temperature)).softmax(-1)

    def patch_products(self, taught_MK: Tensor, patches_MD: Tensor) -> Tensor:
        """[M]: the target's distributions times the log probabilities that the online encoder predicts, summed."""
        return (taught_MK * self.predict(self.online.projector(patches_MD))).sum(1)

    def after_step(self) -> None:
        """Moves target and both centres."""
        mean_K = gather(torch.stack(self._pending_patches).mean(0, keepdim=True)).mean(0)
        self._pending_patches.clear()
        self.patch_centre_K.lerp_(mean_K, 1 - self.config.centre_momentum)
        super().after_step()

    def skip_step(self) -> None:
        self._pending_patches.clear()
        super().skip_step()


def masked_patches(mask_VHW: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [M]: the masked patches of all views by their number, and float [M]: one over those of their view.

    Made on the host, where the number of masked patches is known without waiting for the device.
    """
    masked_M = mask_VHW.flatten().nonzero()[:, 0]
    weight_M = (1 / mask_VHW.sum((1, 2)).clamp_min(1))[masked_M // mask_VHW[0].numel()]
    return masked_M.to(device, non_blocking=True), weight_M.to(device, non_blocking=True)


def block_masks(most_V: Tensor, height: int, width: int) -> Tensor:
    """bool [V, H, W]: up to `most_V` patches of each view, in rectangles of random place, size and shape.

    As in iBOT's loader, after BEiT (algorithm 1 there): rectangles are laid one after the other, of an area between
    (min(H, W) // 3)² patches and what is left to mask, sides' ratio from 0.3 to 1/0.3 on a log scale, each narrower and
    lower than the view. One that would mask too many patches, or none, is drawn again; a view is done when nothing is
    left, or when ten draws in a row did not fit, so that it often stays below its number. All views are drawn at once.
    Draws from torch's global generator.
    """
    mask_VHW = torch.zeros(len(most_V), height, width, dtype=torch.bool)
    y_H1, x_1W = torch.arange(height)[:, None], torch.arange(width)[None]
    least, log_ratio = (min(height, width) // 3) ** 2, math.log(1 / 0.3)
    left_V, failed_V = most_V.clone(), torch.zeros(len(most_V), dtype=torch.int64)
    while len(rows_A := ((left_V > 0) & (failed_V < 10)).nonzero()[:, 0]):  # A views that are not done
        area_A, ratio_A, top_A, start_A = torch.rand(4, len(rows_A)).unbind()
        area_A = least + area_A * (left_V[rows_A] - least)
        ratio_A = torch.exp((2 * ratio_A - 1) * log_ratio)
        high_A, wide_A = (area_A * ratio_A).sqrt().round(), (area_A / ratio_A).sqrt().round()
        top_A, start_A = (top_A * (height - high_A + 1)).floor(), (start_A * (width - wide_A + 1)).floor()
        top, bottom, start, end = (x_A[:, None, None] for x_A in (top_A, top_A + high_A, start_A, start_A + wide_A))
        new_AHW = (y_H1 >= top) & (y_H1 < bottom) & (x_1W >= start) & (x_1W < end) & ~mask_VHW[rows_A]
        count_A = new_AHW.sum((1, 2))
        fits_A = (high_A < height) & (wide_A < width) & (count_A > 0) & (count_A <= left_V[rows_A])
        mask_VHW[rows_A] |= new_AHW & fits_A[:, None, None]
        left_V[rows_A] -= count_A * fits_A
        failed_V[rows_A] = torch.where(fits_A, 0, failed_V[rows_A] + 1)
    return mask_VHW
