"""Diffusion pipelines by diffusers: a small class-conditional one of our own; sampling from it, DiT, text-to-image.

A pipeline is always a folder as diffusers' `save_pretrained` writes it. Only safetensors and classes of diffusers and
transformers are loaded from it: nothing unpickled, no code of a repository run.
Letters: n images, B of them in a batch, C classes, S pixels a side.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shards.errors import InputError, install_extra
from shards.files import clear
from shards.generation.class_names import class_text, find_class, imagenet_classes
from shards.generation.request import Request

try:
    import diffusers
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise InputError(f"diffusers cannot be imported ({error}); {install_extra('generate')}") from error

TIMESTEPS = 1000
SMALLEST_SIDE = 8
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
# What a pipeline does follows from these files alone.
HASHED = (".json", ".txt", ".model", ".safetensors")
# Schedulers that draw nothing while they step; DiTPipeline hands its generator to none.
DRAWLESS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "UniPCMultistepScheduler")
# from_pretrained's argument for the precision has been renamed.
PRECISION_NAME = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Condition = int | str


class ClassPipeline(DiffusionPipeline):
    """A pixel-space diffusion model conditioned on C classes, with class C standing for none.

    Args:
        unet: predicts the velocity v (Salimans & Ho 2022, appendix D) of [B, 1 or 3, S, S] in −1…1.
        scheduler: DDIM with a terminal signal-to-noise ratio of zero (Lin et al. 2024).
        classes: names by class index.
        size: pixels a side that images are enlarged to; 0 leaves them at the network's S.
    """

    model_cpu_offload_seq = "unet"
    unet: Any  # UNet2DModel
    scheduler: Any  # DDIMScheduler

    # The defaults make diffusers read both arguments from the saved config instead of looking for modules.
    def __init__(
        self, unet: UNet2DModel, scheduler: DDIMScheduler, classes: list[str] | None = None, size: int = 0
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(classes=list(classes or []), size=size)

    @property
    def classes(self) -> list[str]:
        return list(self.config["classes"])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 25,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of the given classes (length B; C means of no class) by classifier-free guidance.

        Args:
            guidance_scale: 1 follows the class as trained, more follows it at the cost of variety.
            generator: one for the batch, or one for each image.
            num_inference_steps: DDIM steps.
            output_type: "pil", "np" (float [B, H, W, 3] in 0…1) or "pt" (float [B, 3, H, W] in 0…1).
        """
        count, side = len(class_labels), int(self.unet.config["sample_size"])
        device, kind = self._execution_device, self.unet.dtype
        shape = (count, int(self.unet.config["in_channels"]), side, side)
        noisy = randn_tensor(shape, generator=generator, device=device, dtype=kind)
        labels = torch.as_tensor(list(class_labels), device=device)
        guided = guidance_scale != 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, len(self.classes))])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for moment in self.scheduler.timesteps:
            velocity = self.unet(torch.cat([noisy, noisy]) if guided else noisy, moment, labels).sample
            if guided:
                of_class, of_none = velocity.chunk(2)
                velocity = of_none + guidance_scale * (of_class - of_none)
            noisy = self.scheduler.step(velocity, moment, noisy, return_dict=False)[0]
        images = (noisy.float() / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1)
        if self.config["size"] not in (0, side):
            images = F.interpolate(images, size=(self.config["size"],) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        self.maybe_free_model_hooks()
        result: Any = images
        if output_type != "pt":
            result = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            result = self.numpy_to_pil(result)
        return ImagePipelineOutput(images=result) if return_dict else (result,)


def small_pipeline(side: int, width: int, channels: int, classes: Sequence[str], size: int = 0) -> ClassPipeline:
    """An untrained pipeline; side 8, width 32, one channel and ten classes make 0.69 M parameters.

    Raises:
        InputError: a side or width that the network cannot have.
    """
    if side < SMALLEST_SIDE or side % 4:
        raise InputError(f"--train.side {side}: needs a multiple of 4 from {SMALLEST_SIDE} up")
    if width < 8 or width % 8:
        raise InputError(f"--train.width {width}: needs a multiple of 8")
    sides = [side]
    while sides[-1] > 4 and sides[-1] % 2 == 0:
        sides.append(sides[-1] // 2)
    attended = [level > 0 and length <= 8 for level, length in enumerate(sides)]
    unet = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(width, *[2 * width] * (len(sides) - 1)),
        down_block_types=tuple("AttnDownBlock2D" if one else "DownBlock2D" for one in attended),
        up_block_types=tuple("AttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)),
        add_attention=False,
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=len(classes) + 1,
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    return ClassPipeline(unet, scheduler, list(classes), size)


def save(pipeline: ClassPipeline, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the pipeline, and beside it what it was trained on, so that it is whole or not there at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    clear(partial)
    partial.mkdir(parents=True)
    pipeline.to("cpu").save_pretrained(partial, safe_serialization=True)
    (partial / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    partial.replace(folder)


def locate(name: str) -> Path:
    """The folder of a pipeline: a local one as it is, a hub name (`owner/name` or `owner/name@revision`) downloaded.

    Raises:
        InputError: neither a folder with a pipeline nor a hub name that can be had.
    """
    folder = Path(name)
    if (folder / DiffusionPipeline.config_name).is_file():
        return folder
    parsed = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", name)
    if folder.exists() or parsed is None or name.startswith("."):
        raise InputError(
            f"--pipeline {name}: no {DiffusionPipeline.config_name} there; give a folder that diffusers saved, a hub "
            "name such as facebook/DiT-XL-2-256, or train one into it with --train-on SHARDS"
        )
    hub, revision = parsed.groups()
    try:
        return Path(DiffusionPipeline.download(hub, revision=revision, use_safetensors=True))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"--pipeline {name}: no such folder, and the hub does not give it ({first})") from error


def load(folder: Path, device: str = "cpu", precision: str = "fp32") -> DiffusionPipeline:
    """The pipeline in a folder.

    Raises:
        InputError: the folder holds none, or one that would need unpickling or its own code to load.
    """
    try:
        index = json.loads((folder / DiffusionPipeline.config_name).read_text())
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "give a folder that diffusers' save_pretrained wrote"
        raise InputError(f"--pipeline {folder}: no readable {DiffusionPipeline.config_name}; {remedy}") from error
    kind = ClassPipeline if name == ClassPipeline.__name__ else getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise InputError(f"--pipeline {folder}: its class {name!r} is none of diffusers {diffusers.__version__}")
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and len(value) == 2 else None
        if isinstance(library, str) and part[0] != "_" and (folder / part).is_dir():
            check_part(folder, part, library)
    diffusers.utils.logging.disable_progress_bar()
    try:
        pipeline = kind.from_pretrained(
            folder,
            **{PRECISION_NAME: PRECISIONS[precision]},
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"--pipeline {folder}: cannot be loaded ({first}); save it again with diffusers") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def class_of(folder: Path) -> str:
    """Name of a pipeline's class, as its folder says."""
    return str(json.loads((folder / DiffusionPipeline.config_name).read_text()).get("_class_name"))


def default_device() -> str:
    """The accelerator of this machine, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_precision(device: str) -> str:
    """bf16 has fp32's range, which fp16 lacks: some decoders overflow in it."""
    return "bf16" if device.startswith("cuda") else "fp32"


def check_part(folder: Path, part: str, library: str) -> None:
    """Raises InputError where loading a component would run its own code or unpickle."""
    if library not in ("diffusers", "transformers") and not hasattr(diffusers.pipelines, library):
        raise InputError(f"--pipeline {folder}: {part} comes with its own code ({library}), which is not run")
    files = [path.suffix for path in (folder / part).iterdir()]
    if ".safetensors" not in files and any(suffix in PICKLES for suffix in files):
        remedy = "save it again with save_pretrained(…, safe_serialization=True)"
        raise InputError(f"--pipeline {folder}: {part} has pickled weights alone, which are not read; {remedy}")


def fingerprint(folder: Path) -> str:
    """SHA-256 over names and content of the files that decide what a pipeline gives."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in HASHED and path.is_file() and path.name != "training.json":
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()


def conditions(pipeline: DiffusionPipeline, classes: Sequence[str], prompt: str) -> list[Condition | None]:
    """What the pipeline is asked for an image of each class and, last, of none (so that label −1 indexes it).

    None stands for what the pipeline has no way to be asked.

    Raises:
        InputError: a class that the pipeline does not know, or one that makes images from neither class nor text.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    if isinstance(pipeline, ClassPipeline):
        known = {name: index for index, name in enumerate(pipeline.classes)}
        return [*(find_class(name, known) for name in classes), len(known)]
    if isinstance(pipeline, DiTPipeline):
        known = imagenet_classes() | {name.lower(): index for name, index in pipeline.labels.items()}
        return [*(find_class(name, known) for name in classes), None]
    if "prompt" in accepted and "image" not in without_default(accepted):
        asked = [prompt.replace("{class}", class_text(name)) for name in classes]
        return [*asked, None if "{class}" in prompt else prompt]
    raise InputError(
        f"--pipeline: {type(pipeline).__name__} makes images from neither class nor prompt; "
        "use a DiT or text-to-image pipeline, or train one with --train-on SHARDS"
    )


def without_default(parameters: Any) -> list[str]:
    """Names of the parameters that a call has to give."""
    return [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]


@dataclass(frozen=True)
class Sampler:
    """Draws images from a pipeline in batches of one size, each image from its own seed.

    Attributes:
        conditions: what to ask for by label, from `conditions`.
        batch: images at a time. A smaller batch is filled up, for results of another batch size differ in the last
            bits: so an image depends on its condition, seed and this number, not on what it shares a batch with.
    """

    pipeline: DiffusionPipeline
    conditions: Sequence[Condition | None]
    batch: int
    steps: int
    guidance: float | None

    def __call__(self, labels: Sequence[int], seeds: Sequence[int]) -> tuple[np.ndarray, list[bool]]:
        """At most `batch` labels and seeds → uint8 [n, H, W, 3], and which images the pipeline itself blanked."""
        count = len(labels)
        asked = [self.conditions[label] for label in labels]
        if None in asked:
            remedy = "--per-class leaves images without label out"
            raise InputError(f"--like: {type(self.pipeline).__name__} needs a class for every image; {remedy}")
        asked += [asked[-1]] * (self.batch - count)
        padded = [*seeds, *[seeds[-1]] * (self.batch - count)]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in padded]
        options: dict[str, Any] = {"num_inference_steps": self.steps, "generator": generators, "output_type": "np"}
        if self.guidance is not None:
            options["guidance_scale"] = self.guidance
        options["prompt" if isinstance(asked[0], str) else "class_labels"] = asked
        with settled(int(padded[0])):
            output: Any = self.pipeline(**options)  # pyright: ignore[reportCallIssue]
        pixels = np.asarray(output.images)[:count]
        if not np.isfinite(pixels).all():
            raise InputError("--precision: the pipeline overflows and gives no finite pixels; pass --precision fp32")
        images = np.round(pixels * 255).astype(np.uint8)
        flagged = getattr(output, "nsfw_content_detected", None) or []
        return images, [bool(one) for one in flagged[:count]] or [False] * count


@contextmanager
def settled(seed: int) -> Iterator[None]:
    """Repeatable kernels, and a fixed global state for pipelines that draw from it, restored afterwards."""
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    except torch.OutOfMemoryError as error:
        raise InputError("--batch: it does not fit the device's memory; pass a smaller one") from error
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


def open_sampler(request: Request) -> Sampler:
    """The sampler that a request describes.

    Raises:
        InputError: the pipeline is not there, cannot be loaded, is not the one of the request, or lacks a class.
    """
    folder = locate(request.pipeline)
    if request.fingerprint != fingerprint(folder):
        raise InputError(f"--pipeline {request.pipeline}: it changed meanwhile, or is another one on this machine")
    pipeline = load(folder, request.device, request.precision)
    asked = conditions(pipeline, request.names, request.prompt)
    if isinstance(pipeline, DiTPipeline):
        keep_drawless(pipeline)
    return Sampler(pipeline, asked, request.batch, request.steps, request.guidance)


def keep_drawless(pipeline: DiTPipeline) -> None:
    """Puts DDIM in place of a scheduler that would draw noise from the global state while it steps."""
    scheduler: Any = pipeline.scheduler
    if type(scheduler).__name__ not in DRAWLESS or "sde" in str(scheduler.config.get("algorithm_type", "")):
        pipeline.scheduler = DDIMScheduler.from_config(scheduler.config)
