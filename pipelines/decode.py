"""From image bytes to pixels: the only file that knows DALI.

Two ways through it, for the same bytes and boxes. `DaliDecoder` decodes on the CPU and leaves crops to `crop.py`;
`DaliViews` decodes, slices and resizes in one graph, on a GPU or, operator for operator, on the CPU. It slices before
it resizes: a resize with a region of interest reads past the box, 6/255 at its border. Where a resize shrinks, DALI
lets the outermost pixels stand in for those beyond the box and torch leaves those out: up to 20/255 in the border row
of noise. So the patch gets a margin of zeros, and the border row is divided by the share of its weight that lies inside
(`inner_share`). Torch resizes rows first, rounds, then columns; so two resizes do here, of one axis each. What is left
between the two is the border's rounding: at most 2/255, on average 0.01/255 at 224 pixels and 0.04 at 32.

A cubic has negative weights, reaches two pixels, and does so when it enlarges too. So bicubic patches always have the
margin, and all rows and columns are divided by their shares (`cubic_shares`) before they are rounded: at most 2/255
from torch, on average 0.03/255 of noise at 224 pixels and 0.01 of photographs.

DALI cannot skip a sample: one broken image fails its batch, and its parser may end the process with a segmentation
fault. So `DaliDecoder` gives what does not look whole to Pillow, whose pixels are the same; where a batch fails all the
same, Pillow decodes it and the pipeline, which may not be run again, is replaced. `DaliViews` gets a PNG instead of
what does not look whole, and halves a batch that fails.
Where DALI has no wheel (macOS), `PillowDecoder` keeps the same contract.

EXIF orientation is ignored, as by torchvision's ImageFolder: boxes are drawn from the stored height and width.

Shape suffixes: B images, n views of one group, S side of a view in pixels, 3 channels.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pipelines.params import ViewParams
from pipelines.policies import Interpolation
from shards.errors import InputError
from shards.formats import END_OF_JPEG, END_OF_PNG, trimmed

Bytes = NDArray[np.uint8]
HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _dali() -> tuple[Any, Any, Any]:
    """DALI's operators, its graph decorator and its types: untyped, for its stubs don't know graph nodes."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import pipeline_def

    return fn, pipeline_def, types


class Decoder(Protocol):
    """Bytes in, RGB images out; a broken image is a value, not an exception."""

    def decode(self, data: Sequence[Bytes]) -> list[Tensor | str]:
        """uint8 [height, width, 3] in RGB for each item, or why it cannot be decoded.

        The images are views of the decoder's memory: they hold until the next call.
        """
        ...


class BrokenImagesError(Exception):
    """Images that a batch cannot be made of: row → reason."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} images cannot be decoded")
        self.reasons = reasons


def open_decoder(batch: int, threads: int = 1, backend: str = "auto") -> Decoder:
    """A CPU decoder for up to `batch` images at a time: `dali`, `pillow`, or, by `auto`, DALI where it is installed.

    Raises:
        InputError: for DALI where it is not installed, or another name.
    """
    if backend == "auto":
        backend = "dali" if HAS_DALI else "pillow"
    if backend == "pillow":
        return PillowDecoder()
    if backend != "dali":
        raise InputError(f"decoder: {backend!r} is not known; choose one of auto, dali, pillow")
    if not HAS_DALI:
        raise InputError("decoder: 'dali' is not installed; install nvidia-dali-cuda130 (Linux), or choose pillow")
    return DaliDecoder(batch, threads)


class PillowDecoder:
    """Pillow, one image after the other."""

    def decode(self, data: Sequence[Bytes]) -> list[Tensor | str]:
        """See `Decoder.decode`."""
        return [self._one(item) for item in data]

    @staticmethod
    def _one(item: Bytes) -> Tensor | str:
        try:
            with Image.open(io.BytesIO(item.tobytes())) as image:
                return torch.from_numpy(np.array(image.convert("RGB")))
        except UnidentifiedImageError:
            return "Pillow: not an image, or its header is damaged"
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"Pillow: {error}"


class DaliDecoder:
    """DALI's CPU decoder, fed with our bytes; `batch` is the most it takes at a time."""

    def __init__(self, batch: int, threads: int = 1) -> None:
        fn, pipeline_def, types = _dali()

        @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=1)
        def graph() -> Any:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            return fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False)

        self._graph = graph
        self._pipeline = built(graph())

    def decode(self, data: Sequence[Bytes]) -> list[Tensor | str]:
        """See `Decoder.decode`."""
        whole = [row for row, item in enumerate(data) if looks_whole(item)]
        decoded = dict(zip(whole, self._run([data[row] for row in whole]), strict=True))
        return [decoded[row] if row in decoded else PillowDecoder().decode([item])[0] for row, item in enumerate(data)]

    def _run(self, data: list[Bytes]) -> list[Tensor | str]:
        if not data:
            return []
        try:
            (images,) = self._pipeline.run(data=data)
        except RuntimeError:
            self._pipeline = built(self._graph())
            return PillowDecoder().decode(data)
        return [torch.from_dlpack(images[row]) for row in range(len(data))]


def looks_whole(item: Bytes) -> bool:
    """Whether the bytes begin and end as a JPEG, PNG or WebP does; takes under a microsecond for most."""
    head = item[:12].tobytes()
    if head[:4] == b"RIFF":
        extension = "webp"
    elif head[:8] == b"\x89PNG\r\n\x1a\n":
        extension = "png"
    elif head[:3] == b"\xff\xd8\xff":
        extension = "jpg"
    else:
        return False
    tail = item[-8:].tobytes()
    if (extension == "jpg" and tail.endswith(END_OF_JPEG)) or (extension == "png" and tail == END_OF_PNG):
        return True
    return trimmed(item.tobytes(), extension) is not None


def parsable(data: Sequence[Bytes]) -> list[Bytes]:
    """The same images as DALI can parse without harm: what does not look whole is decoded by Pillow and becomes a PNG.

    Raises:
        BrokenImagesError: naming all rows that Pillow cannot decode.
    """
    safe, broken = list(data), {}
    for row, item in enumerate(data):
        if not looks_whole(item):
            (image,) = PillowDecoder().decode([item])
            if isinstance(image, str):
                broken[row] = image
            else:
                png = io.BytesIO()
                Image.fromarray(image.numpy()).save(png, "PNG", compress_level=1)
                safe[row] = np.frombuffer(png.getvalue(), np.uint8)
    if broken:
        raise BrokenImagesError(broken)
    return safe


def built(pipeline: Any) -> Any:
    """The same pipeline of DALI, ready to run."""
    pipeline.build()
    return pipeline


def views_graph(
    batch: int,
    groups: Sequence[tuple[int, int]],
    device: torch.device,
    threads: int,
    interpolation: Interpolation = "bilinear",
) -> Any:
    """The graph of `DaliViews`, defined but not built: only building it needs the device."""
    fn, pipeline_def, types = _dali()

    gpu, cubic = device.type == "cuda", interpolation == "bicubic"
    backend = "gpu" if gpu else "cpu"
    device_id = (device.index if device.index is not None else torch.cuda.current_device()) if gpu else None
    # With fancy upsampling nvJPEG interpolates chroma as libjpeg-turbo does on the CPU. The hardware decoder is left
    # out: it would take a share of each batch, and an image's pixels would depend on its place there.
    nvjpeg = {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0} if gpu else {}

    def view(image: Any, index: int, size: int) -> Any:
        # Every view has inputs of its own: DALI would merge identical subgraphs.
        box, frame = (fn.external_source(name=f"{name}{index}", dtype=types.INT32, ndim=1) for name in ("box", "frame"))
        across, down = (fn.external_source(name=f"{n}{index}", dtype=types.FLOAT, ndim=1) for n in ("across", "down"))
        flip = fn.external_source(name=f"flip{index}", dtype=types.INT32, ndim=0)
        patch = fn.slice(image, box[0:2], box[2:4], axes=(0, 1), device=backend)
        patch = fn.slice(patch, frame[0:2], frame[2:4], axes=(0, 1), out_of_bounds_policy="pad", device=backend)
        for name, axis in (("across", across), ("down", down)):
            patch = fn.resize(
                patch,
                size=axis[0:2],
                roi_start=axis[2:4],
                roi_end=axis[4:6],
                interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
                antialias=True,
                dtype=types.FLOAT if cubic else types.UINT8,
                device=backend,
            )
            if cubic:
                share = fn.external_source(name=f"share_{name}{index}", dtype=types.FLOAT, ndim=3)
                patch = fn.cast(patch / (share.gpu() if gpu else share), dtype=types.UINT8, device=backend)
        return fn.flip(patch, horizontal=flip, device=backend)

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)
    def graph() -> Any:
        # The caller holds on to the bytes until the run is over.
        data = fn.external_source(name="data", dtype=types.UINT8, ndim=1, no_copy=True)
        image = fn.decoders.image(
            data,
            output_type=types.RGB,
            adjust_orientation=False,
            device="mixed" if gpu else "cpu",
            **nvjpeg,
        )
        outputs, index = [], 0
        for count, size in groups:
            outputs.append(fn.stack(*(view(image, index + v, size) for v in range(count))))
            index += count
        return tuple(outputs)

    return graph()


class DaliViews:
    """Decode, slice, resize and mirror in one DALI graph: all views of a batch, on a GPU or on the CPU.

    Args:
        batch: the most images at a time.
        groups: (views, side in pixels) of each group of views.
        device: where the graph runs; the bytes are parsed on the CPU either way.
        threads: CPU threads of the graph.
        interpolation: how patches are resized.
    """

    def __init__(
        self,
        batch: int,
        groups: Sequence[tuple[int, int]],
        device: torch.device,
        threads: int,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        self._sizes_N = np.repeat([size for _, size in groups], [count for count, _ in groups])
        self._cubic = interpolation == "bicubic"
        self._pipeline = built(views_graph(batch, groups, device, threads, interpolation))

    def crops(self, data: Sequence[Bytes], params: Sequence[ViewParams]) -> list[Tensor]:
        """uint8 [B, n, S, S, 3] for each group, mirrored where the parameters say so; the caller's own memory.

        Args:
            params: [B, n] of each group.

        Raises:
            BrokenImagesError: naming all rows that cannot be decoded.
        """
        data = parsable(data)
        joined = ViewParams.concatenate(params, axis=1)
        boxes = _boxes(joined, self._sizes_N, self._cubic)
        if self._cubic:
            boxes |= _shares(joined, self._sizes_N)
        try:
            outputs = self._run(list(data), boxes)
        except RuntimeError as error:
            reasons = find_broken(
                lambda rows: self._run([data[row] for row in rows], {name: box[rows] for name, box in boxes.items()}),
                len(data),
            )
            if not reasons:  # not the images' fault: out of memory, a lost device
                raise
            raise BrokenImagesError(reasons) from error
        if not self._cubic:
            for crops_BnSS3, views in zip(outputs, params, strict=True):
                _mend_borders(crops_BnSS3, views)
        return outputs

    def _run(self, data: list[Bytes], boxes: dict[str, NDArray[np.generic]]) -> list[Tensor]:
        # Without a stream of ours the outputs are ready when run() returns; their memory is DALI's until the next run.
        outputs = [torch.from_dlpack(output.as_tensor()).clone() for output in self._pipeline.run(data=data, **boxes)]
        if outputs[0].is_cuda:
            torch.cuda.current_stream(outputs[0].device).synchronize()
        return outputs


def _boxes(params: ViewParams, sizes_N: NDArray[np.integer], cubic: bool) -> dict[str, NDArray[np.generic]]:
    """The graph's inputs besides the bytes, a row for each image; `sizes_N` are the sides that the views get.

    Of each resize: the height and width to get, and the first and last of both axes to get them from, pixels.
    """
    start_NB2, length_NB2 = (
        np.stack([rows.T, columns.T], -1)
        for rows, columns in ((params.top, params.left), (params.height, params.width))
    )
    margin_NB2 = ((length_NB2 > sizes_N[:, None, None]) | cubic).astype(np.int32)
    frame_NB2 = length_NB2 + 2 * margin_NB2
    first_NB2, last_NB2 = margin_NB2, margin_NB2 + length_NB2  # of the frame: what is resized
    size_NB = np.broadcast_to(sizes_N[:, None], frame_NB2.shape[:2])
    zero_NB = np.zeros_like(size_NB)
    across = (frame_NB2[..., 0], size_NB, zero_NB, first_NB2[..., 1], frame_NB2[..., 0], last_NB2[..., 1])
    down = (size_NB, size_NB, first_NB2[..., 0], zero_NB, last_NB2[..., 0], size_NB)
    inputs = {
        "box": np.concatenate([start_NB2, length_NB2], -1),
        "frame": np.concatenate([-margin_NB2, frame_NB2], -1),
        "across": np.stack(across, -1).astype(np.float32),
        "down": np.stack(down, -1).astype(np.float32),
        "flip": params.flip.T.astype(np.int32),
    }
    # DALI takes dense memory only.
    return {
        f"{name}{view}": np.ascontiguousarray(values_B)
        for name, values_NB in inputs.items()
        for view, values_B in enumerate(values_NB)
    }


def _shares(params: ViewParams, sizes_N: NDArray[np.integer]) -> dict[str, NDArray[np.generic]]:
    """What a bicubic graph divides by, for each image and view: float [B, 1, S, 1] across and [B, S, 1, 1] down."""
    shares: dict[str, NDArray[np.generic]] = {}
    for view, size in enumerate(sizes_N.tolist()):
        for name, lengths, shape in (("across", params.width, (1, size, 1)), ("down", params.height, (size, 1, 1))):
            rows = [cubic_shares(length, size).reshape(shape) for length in lengths[:, view].tolist()]
            shares[f"share_{name}{view}"] = np.stack(rows)
    return shares


@lru_cache(maxsize=8192)
def cubic_shares(length: int, size: int) -> NDArray[np.float32]:
    """[size]: what of each pixel's weight lies inside the box, in an antialiased cubic resize of `length` to `size`.

    The filter is the cubic convolution with a = −1/2 (Keys 1981), stretched by `length / size` where that is above 1.
    """
    scale = length / size
    stretch = max(scale, 1)
    taps_K = np.arange(-math.ceil(2 * stretch), length + math.ceil(2 * stretch))
    x_SK = np.abs(taps_K + 0.5 - scale * (np.arange(size)[:, None] + 0.5)) / stretch
    near_SK, far_SK = 1 + x_SK**2 * (1.5 * x_SK - 2.5), 2 + x_SK * (x_SK * (2.5 - 0.5 * x_SK) - 4)
    weights_SK = np.where(x_SK < 1, near_SK, np.where(x_SK < 2, far_SK, 0))
    inside_K = (taps_K >= 0) & (taps_K < length)
    return (weights_SK[:, inside_K].sum(1) / weights_SK.sum(1)).astype(np.float32)


def inner_share(length: NDArray[np.integer], size: int) -> NDArray[np.float32]:
    """What of an outermost pixel's weight lies inside the box, in an antialiased linear resize of `length` to `size`.

    The filter is a triangle of `length / size` pixels to each side; without shrinking nothing is lost.
    """
    scale = np.maximum(length[..., None] / size, 1)
    reach = math.ceil(scale.max(initial=1))
    taps_K = np.arange(-reach, 2 * reach + 1)
    weights = np.maximum(0, 1 - np.abs(taps_K + 0.5 - scale / 2) / scale)
    inside = (weights * ((taps_K >= 0) & (taps_K < length[..., None]))).sum(-1) / weights.sum(-1)
    return np.where(length > size, inside, 1).astype(np.float32)


def _mend_borders(crops_BnSS3: Tensor, params: ViewParams) -> None:
    """Makes the margin of zeros undone in the outermost rows and columns, in place."""
    size = crops_BnSS3.shape[2]
    for axis, length_Bn in ((2, params.height), (3, params.width)):
        share_Bn = torch.from_numpy(inner_share(length_Bn, size)).to(crops_BnSS3.device, non_blocking=True)
        share_Bn11 = share_Bn[..., None, None]
        for edge in {0, size - 1}:
            border_BnS3 = crops_BnSS3.select(axis, edge)
            border_BnS3.copy_((border_BnS3 / share_Bn11).round_().clamp_(max=255))


def find_broken(run: Callable[[list[int]], object], count: int) -> dict[int, str]:
    """Rows for which `run` raises RuntimeError, with the reason, by halving: about 2 log₂(count) runs a broken row."""
    broken: dict[int, str] = {}

    def search(rows: list[int]) -> None:
        try:
            run(rows)
        except RuntimeError as error:
            if len(rows) == 1:
                broken[rows[0]] = _reason(error)
                return
            middle = len(rows) // 2
            search(rows[:middle])
            search(rows[middle:])

    if count:
        search(list(range(count)))
    return broken


def _reason(error: RuntimeError) -> str:
    """What DALI's error says about the image; the lines before say where in the graph, those after nothing."""
    _, _, reason = str(error).partition("encountered:")
    lines = [line.strip(" :") for line in (reason or str(error)).strip().splitlines()]
    return f"DALI: {lines[0]}" if lines else "DALI: cannot be decoded"
