"""Weights of earlier trainings and of other people's → a backbone, by timm's own conversions.

Keys of timm, and of checkpoints of DINO, DINOv2, DINOv3, MoCo v3, MoBY and this project.
"""

import contextlib
import importlib
import inspect
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Keys that show where in a checkpoint a backbone begins: of ViTs and Swins, and of ConvNeXt's authors.
ANCHORS = ("patch_embed.proj.weight", "stages.0.0.dwconv.weight")
# Words of a prefix that mark the momentum encoder: DINO's, this project's, MoCo v3's, MoBY's, timm's.
TARGET = re.compile(r"(^|[._])(teacher|target|momentum_encoder|encoder_k|ema)([._]|$)")


@dataclass(frozen=True)
class Misfits:
    """Names that did not fit."""

    fresh: tuple[str, ...]
    """In the backbone, but not in the weights."""
    unused: tuple[str, ...]
    """In the weights, but not in the backbone."""


def backbone_weights(
    content: Mapping[str, Any], backbone: nn.Module, which: Literal["kept", "online", "target"]
) -> dict[str, Tensor]:
    """The tensors of one encoder's backbone in a checkpoint, without the prefixes of what surrounds it.

    Of a checkpoint with two encoders, `which` names one; `kept` is the one that is evaluated: DINO's teacher, else the
    online encoder.

    Raises:
        ValueError: there is no backbone in it.
    """
    tensors = dict(flat_tensors(content))
    own = [name for name, tensor in backbone.state_dict().items() if tensor.ndim > 1]
    for anchor in (*ANCHORS, own[-1]):
        prefixes = [name.removesuffix(anchor) for name in tensors if name == anchor or name.endswith(f".{anchor}")]
        if prefixes:
            break
    else:
        raise ValueError("holds no weights of such a backbone; give a checkpoint of the same family")
    target = [prefix for prefix in prefixes if TARGET.search(prefix)]
    online = [prefix for prefix in prefixes if not TARGET.search(prefix)]
    first_target = which == "target" or (which == "kept" and any("teacher" in prefix for prefix in target))
    prefix = ((target + online) if first_target else (online + target))[0]
    picked = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    # DINOv2's training code keeps blocks in chunks: blocks.CHUNK.NUMBER
    return {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): tensor for name, tensor in picked.items()}


def flat_tensors(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested dicts with its dotted name."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from flat_tensors(value, f"{prefix}{name}.")


def load_weights(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> Misfits:
    """Puts weights into a backbone as timm does: older keys are renamed, position embeddings resampled to its grid,
    patch projections to its patch size, Swin's biases to its windows.

    Raises:
        ValueError: nothing fits, or weights of another shape.
    """
    own = backbone.state_dict()
    try:
        converted = as_timm_loads(backbone, dict(tensors))
    except (AttributeError, AssertionError, KeyError, RuntimeError) as error:
        raise ValueError(f"does not fit this backbone ({' '.join(str(error).split())[:120]})") from error
    common = own.keys() & converted.keys()
    if not common:
        raise ValueError("has no tensor that this backbone has")
    for name in own:
        if name in common and own[name].shape != converted[name].shape:
            raise ValueError(
                f"has {name} of shape {list(converted[name].shape)}, the backbone's is {list(own[name].shape)}"
            )
    backbone.load_state_dict({name: converted[name] for name in common}, strict=False)
    return Misfits(
        tuple(name for name in own if name not in common and not name.endswith("num_batches_tracked")),
        tuple(name for name in converted if name not in common),
    )


def as_timm_loads(backbone: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors after the conversion that timm makes for this family when it loads pretrained weights."""
    modules = [importlib.import_module(kind.__module__) for kind in type(backbone).__mro__]  # ours may be a subclass
    convert = next((module.checkpoint_filter_fn for module in modules if hasattr(module, "checkpoint_filter_fn")), None)
    if convert is None:
        return tensors
    # DeiT III's old names, which timm converts for its models alone
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    # timm prints what DINOv3's keys lack, and torch tells it how to be faster.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return convert(tensors, backbone, **options)
