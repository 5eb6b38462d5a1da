"""Signs of health of a run: gradient norms by layer, the NaN guard, model FLOPs."""

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from jobs.run.checkpoint import entries
from jobs.run.failure import TrainingFailedError


def layer_of(name: str) -> str:
    """Groups a parameter's name by layer: `backbone.blocks.3.attn.qkv.weight` → `backbone.blocks.3`."""
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match.group(1) if match else name.rsplit(".", 1)[0]


def gradient_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """ℓ2 norm of the gradient per layer, on the device: scalars by layer name.

    MoCo v3 (section 4.1) saw training spikes start at the patch projection: its norm rises some steps earlier.
    """
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = torch._foreach_norm([g for _, g in named])  # pyright: ignore[reportPrivateImportUsage]
    for (name, _), norm in zip(named, norms, strict=True):
        squares[layer_of(name)].append(norm.float() ** 2)
    return {layer: torch.stack(parts).sum().sqrt() for layer, parts in squares.items()}


def clip_and_norm(parameters: list[nn.Parameter], clip: float, *, by_tensor: bool = False) -> torch.Tensor:
    """The norm of all gradients before clipping; they are scaled to a norm of at most `clip` (0 = left alone), together
    or each tensor by itself, without waiting for the device."""
    if not by_tensor or clip <= 0:
        return nn.utils.clip_grad_norm_(parameters, clip if clip > 0 else float("inf"), foreach=True)
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore[reportPrivateImportUsage]
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()))  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(norms)


@dataclass
class FiniteGuard:
    """Counts steps that were skipped because loss or gradient was not finite; `limit` in a row end the run."""

    limit: int
    skipped: int = 0
    in_a_row: int = 0

    def skip(self, step: int, model: nn.Module, loss: float, checkpoints: str) -> None:
        """Counts one skipped step; `checkpoints` is the run's folder of them.

        Raises:
            TrainingFailedError: `limit` steps in a row were not finite.
        """
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            bad = [layer for layer, norm in gradient_norms(model).items() if not bool(torch.isfinite(norm))]
            where = f"first layer with a gradient that is not finite: {bad[0]}" if bad else "all gradients are finite"
            first = step + 1 - self.in_a_row  # steps finished before the first of them
            good = [str(entry.path) for entry in entries(Path(checkpoints)) if entry.step <= first] or ["none"]
            raise TrainingFailedError(
                f"step {step}: the loss is {loss} and {self.in_a_row} steps in a row were not finite; {where}; "
                f"last good checkpoint: {good[-1]}; --resume keeps the settings and so meets the same again: begin "
                f"anew (--overwrite, or another --run) with a lower --optimizer.lr or with --optimizer.clip-norm 1"
            )

    def passed(self) -> None:
        """Marks a finite step."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """What a resumed run goes on with; the limit is the configuration's."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


# Dense bf16 peak, TFLOP/s, from the vendors' data sheets; matched against the start of torch's device name.
PEAK_TFLOPS = {"NVIDIA H200": 989, "NVIDIA H100": 989, "NVIDIA A100": 312, "NVIDIA L40S": 362, "NVIDIA B200": 2250}


def peak_flops(device: torch.device) -> float:
    """Peak FLOP/s of the device: from the data sheet, else the best rate of a large fp32 product here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for start, tera in PEAK_TFLOPS.items():
            if name.startswith(start):
                return tera * 1e12
    side, times = 1024, []
    a = torch.rand(side, side, device=device)
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def forward_flops(model: nn.Module, size: int, device: torch.device) -> int:
    """FLOPs of one forward pass of one image with sides of `size` pixels."""
    from torch.utils.flop_counter import FlopCounterMode

    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward(torch.zeros(1, 3, size, size, device=device))  # not compiled, which would hide the products
    model.train(training)
    return counter.get_total_flops()
