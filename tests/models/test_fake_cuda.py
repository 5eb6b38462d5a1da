"""Every objective's selection and loss on CUDA tensors without values: no wait, no tensor on the wrong device."""

import pytest
import torch

from models.negatives import NegativesConfig
from models.objectives import ibot
from models.selection import SelectionConfig, pair_index, select
from tests.fake_cuda import GPU, NoWaits, as_fake, fake_cuda, move
from tests.models.objective_cases import CONFIGS, built, crops_for
from tests.models.test_autocast import SCORED

SYNTHETIC = NegativesConfig(8, 4, 4, 4, 4, 4, 4, start_epoch=0, last_epochs_without=0, of_epochs=None)


@pytest.fixture(autouse=True)
def indices_of_their_own():
    """What is made once for a device, others must not find without values."""
    pair_index.cache_clear()
    yield
    pair_index.cache_clear()


def test_waits_are_noticed(monkeypatch):
    with fake_cuda(monkeypatch):
        on_device, mask = torch.ones(4, device=GPU), torch.ones(4, device=GPU) > 0
        with NoWaits():
            torch.ones(4).to(GPU, non_blocking=True)
            on_device.to("cpu", non_blocking=True)
            on_device[mask.long()]
            for waiting in (
                lambda: on_device.sum().item(),
                lambda: bool(mask.all()),
                on_device.cpu,
                lambda: torch.ones(4).to(GPU),
                lambda: torch.ones(4).copy_(on_device),
                lambda: torch.tensor([1.0], device=GPU),
                lambda: on_device[mask],
                lambda: on_device[torch.tensor([1, 2])],
                mask.nonzero,
            ):
                with pytest.raises(AssertionError, match="the host waits"):
                    waiting()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("name", "encoder"), [*SCORED, ("synthetic", "online")])
def test_a_step_stays_on_the_device(name, encoder, half, monkeypatch):
    fields = {} if name in CONFIGS else {"negatives": SYNTHETIC}
    name = name if name in CONFIGS else "moby"
    objective, views = built(name, **fields), crops_for(name, batch=16)
    selection = SelectionConfig(encoder=encoder, precision="auto" if half else "same")
    # iBOT draws its masks on the host, until they fit: by values, which there are none of.
    monkeypatch.setattr(ibot, "block_masks", lambda most_V, *sides: torch.ones(len(most_V), *sides, dtype=torch.bool))
    with fake_cuda(monkeypatch):
        move(objective)
        crops = tuple(as_fake(view) for view in views)
        pair_index(views[0].shape[1], GPU)  # made once, which waits
        with NoWaits():
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                scores = objective.pair_losses(crops, selection)
                chosen = objective.take(crops, select(scores.losses_BP, "hardest"), scores)
                loss, metrics = objective.loss(chosen)
                objective.audit(crops, torch.zeros(16, dtype=torch.int64, device=GPU), selection)
            objective.after_step()
        assert loss.device == scores.losses_BP.device == GPU
        assert loss.dtype == scores.losses_BP.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in metrics.values())
        assert all(value.device == GPU for value in objective.state_dict().values() if torch.is_tensor(value))
