"""A backbone as a folder that timm and the Hugging Face hub read: weights, config, model card, ONNX.

Suffixes: B images, S side in pixels.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from jobs.evaluation.features import default_crop
from jobs.evaluation.frozen import IMAGENET_MEAN, IMAGENET_STD
from models.backbones import BackboneConfig, timm_options
from shards.errors import InputError, install_extra

# Largest difference of a feature between the exported and the original model, relative to the features' deviation.
TOLERANCE = 1e-4


def write_timm_folder(config: BackboneConfig, model: nn.Module, out: Path, licence: str = "") -> None:
    """Writes config.json, with the crop that evaluation takes, and model.safetensors.

    Raises:
        InputError: an architecture that timm cannot build.
    """
    if config.batchnorm_mlp:
        raise InputError(
            "backbone.batchnorm_mlp: timm has no ViT with BatchNorm before its MLPs; export this run with --only-onnx"
        )
    # With the number of heads: a ViT-S with 12 heads and one with 6 have the same weights' shapes.
    arguments = timm_options(config)
    size, pool = config.image_size, getattr(model, "global_pool", "avg")
    content = {
        "architecture": config.name,
        "num_classes": 0,
        "num_features": int(model.num_features),  # type: ignore[arg-type]
        "global_pool": pool if isinstance(pool, str) else "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "hardviews",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": "img_size" in arguments,
            "interpolation": "bilinear",
            "crop_pct": default_crop(size),
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": getattr(model, "default_cfg", {}).get("first_conv", "patch_embed.proj"),
            "classifier": getattr(model, "default_cfg", {}).get("classifier", "head"),
            **({"license": licence} if licence else {}),
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def check_timm_folder(model: nn.Module, size: int, out: Path) -> float:
    """Loads the folder by plain timm and returns the largest difference of a feature, over the features' deviation.

    Raises:
        RuntimeError: it differs by more than TOLERANCE: a mistake of ours, not of the user.
    """
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return _compare(model, loaded, size)


def write_onnx(model: nn.Module, size: int, out: Path) -> None:
    """Writes model.onnx: float [batch, 3, S, S] → [batch, D], any batch size.

    Raises:
        InputError: the ONNX packages are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"onnx: {error.name} is not installed; {install_extra('onnx')}") from error
    out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter deprecates parts of itself
        program = torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, size, size),),
            dynamo=True,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.save(out / "model.onnx", external_data=False)


def check_onnx(model: nn.Module, size: int, out: Path) -> float:
    """Runs model.onnx and returns the largest difference of a feature, over the features' deviation.

    Raises:
        InputError: onnxruntime is not installed.
        RuntimeError: it differs by more than TOLERANCE.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"onnx: onnxruntime is not installed; {install_extra('onnx')}") from error
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    return _compare(model, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), size)


@torch.no_grad()
def _compare(model: nn.Module, other: Any, size: int) -> float:
    probe_B3SS = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(probe_B3SS)
    difference = float((other(probe_B3SS) - expected).abs().max() / expected.std().clamp_min(1e-12))
    if difference > TOLERANCE:
        raise RuntimeError(f"the exported features differ from the run's by {difference:.2g} of their deviation")
    return difference
