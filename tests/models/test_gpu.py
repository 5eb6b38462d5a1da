"""Models on a CUDA device: the CPU's losses and choices, no wait of the host, formats. Run by `make gpu-check`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from models.negatives import NegativesConfig
from models.precision import arithmetic
from models.selection import SelectionConfig, select

from .objective_cases import CONFIGS, built, crops_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # torch calls the mode that finds waits a prototype.
    pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # a hint of torch's compiler
]

GPU = torch.device("cuda")
SYNTHETIC = NegativesConfig(8, 4, 4, 4, 4, 4, 4, start_epoch=0, last_epochs_without=0, of_epochs=None)


@pytest.fixture(autouse=True)
def products_in_fp32(monkeypatch):
    """PyTorch's convolutions are TF32 by default, whose 10 bits of mantissa would not meet the tolerances below."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match=r"[Ss]ynchroniz"), nothing_waits():
        torch.ones(1, device=GPU).item()


@pytest.mark.parametrize("encoder", ["online", "target"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cpu_s_losses_and_choices(name, encoder):
    torch.manual_seed(0)
    here = built(name)
    if encoder == "target" and here.target is None:
        pytest.skip("there is no target")
    there, crops, selection = copy.deepcopy(here).to(GPU), crops_for(name, batch=32), SelectionConfig(encoder=encoder)
    expected = here.pair_losses(crops, selection).losses_BP
    found = there.pair_losses(tuple(c.to(GPU) for c in crops), selection).losses_BP.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (select(found, "hardest") == select(expected, "hardest")).float().mean() >= 0.96


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ibot"])  # its masks are drawn on the device
def test_the_cpu_s_loss_and_gradients(name):
    torch.manual_seed(0)
    here, crops = built(name), crops_for(name, batch=16)
    there = copy.deepcopy(here).to(GPU)
    choice = torch.zeros(16, dtype=torch.int64)
    losses = []
    for objective, device in ((here, torch.device("cpu")), (there, GPU)):
        on_device = tuple(c.to(device) for c in crops)
        scores = objective.pair_losses(on_device, SelectionConfig())
        loss, _ = objective.loss(objective.take(on_device, choice.to(device), scores))
        loss.backward()
        losses.append(loss.detach().cpu())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    for (key, one), (_, two) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        if one.grad is not None:
            assert two.grad is not None
            assert (two.grad.cpu() - one.grad).norm() <= 0.02 * one.grad.norm() + 1e-4, key


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_selection_does_not_make_the_host_wait(name, half):
    objective = built(name).to(GPU)
    crops = tuple(c.to(GPU) for c in crops_for(name, batch=32))

    def chosen():
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            scores = objective.pair_losses(crops, SelectionConfig())
            return objective.take(crops, select(scores.losses_BP, "hardest"), scores)

    chosen()  # what is made once is made here
    with nothing_waits():
        chosen()


def test_a_step_with_synthetic_negatives_does_not_make_the_host_wait():
    objective = built("moby", negatives=SYNTHETIC).to(GPU)
    crops = tuple(c.to(GPU) for c in crops_for("moby", batch=32))
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], fused=True)

    def step():
        scores = objective.pair_losses(crops, SelectionConfig())
        loss, _ = objective.loss(objective.take(crops, select(scores.losses_BP, "hardest"), scores))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step()

    step()
    with nothing_waits():
        step()


def test_compiled_backbones_score_in_bf16():
    """Autocast changes for a while, which compiled code has to notice."""
    plain, x = built("moby").to(GPU).online.backbone.eval(), torch.randn(32, 3, 16, 16, device=GPU)
    compiled = copy.deepcopy(plain)
    compiled.compile(dynamic=False)
    with torch.no_grad():
        exact = plain(x)
        torch.testing.assert_close(compiled(x), exact, rtol=1e-3, atol=1e-3)
        with arithmetic("bf16", GPU):
            expected = plain(x).float()
        with arithmetic("bf16", GPU):
            found = compiled(x).float()
        assert (expected - exact).norm() > 1e-4 * exact.norm()
        assert (found - expected).norm() <= 0.5 * (expected - exact).norm() + 1e-2 * exact.norm()
        torch.testing.assert_close(compiled(x), exact, rtol=1e-3, atol=1e-3)
