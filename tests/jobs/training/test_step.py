"""One training step: which pair trains, and gradient accumulation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs_of_training import finish, rows, same_rows, two_ranks, weights

from jobs.pretrain import pretrain
from jobs.run.config import PretrainConfig, ViewsConfig, save_config
from jobs.run.folder import RunFolder
from jobs.run.metrics import read_metrics
from jobs.run.optim import OptimizerConfig
from jobs.run.world import World
from models.objectives import DINOConfig, Length, build_objective


@pytest.fixture
def uncoupled(tiny: PretrainConfig) -> PretrainConfig:
    """Three steps in which an image's loss knows nothing of the others of its batch, by an optimizer that is linear in
    the gradient: Adam's steps depend on the sign of gradients that are nearly 0."""
    return replace(
        tiny,
        objective=DINOConfig(outputs=24, hidden=16, bottleneck=12, local_views=2, freeze_epochs=0),
        views=ViewsConfig("dino", local_views=3, local_size=8),
        backbone=replace(tiny.backbone, drop_path=0.0),
        optimizer=OptimizerConfig("sgd", lr=0.5, lr_batch=16, warmup_epochs=0, clip_norm=0.3),
        monitor=replace(tiny.monitor, every=1),
        steps=3,
    )


def curve(run: Path, name: str) -> list[float]:
    """A metric's value at every step."""
    return [line[name] for line in read_metrics(RunFolder(run).metrics) if name in line]


@pytest.mark.timeout(300)
def test_parts_of_a_batch_learn_what_the_whole_does(
    uncoupled: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradient norms, losses, weights, centre, momentum and bank, at world sizes 1 and 2."""
    arguments = []
    for parts in (2, 4):
        file = tmp_path / f"{parts}.json"
        save_config(replace(uncoupled, accumulate=parts), file)
        arguments += [str(file), str(tmp_path / f"ranks{parts}"), "new"]
    ranks = two_ranks(*arguments)
    steps, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *given: steps.append(1) or step(*given))
    for parts in (1, 2, 4):
        pretrain(replace(uncoupled, accumulate=parts), tmp_path / f"parts{parts}")
    assert len(steps) == 3 * 3  # runs × steps, however many parts
    finish(ranks, 200)
    whole = tmp_path / "parts1"
    learned = weights(whole)
    for name in ("parts2", "parts4", "ranks2", "ranks4"):
        run = tmp_path / name
        same_rows(whole, run, exact=False)
        for metric in ("train/loss", "train/grad_norm", "monitor/bank_knn"):
            assert curve(run, metric) == pytest.approx(curve(whole, metric), rel=1e-4), (name, metric)
        for part, value in weights(run).items():
            torch.testing.assert_close(value, learned[part], rtol=1e-4, atol=1e-6, msg=f"{name}: {part}")


@pytest.mark.timeout(300)
def test_a_frozen_layer_neither_decays_nor_counts_steps(uncoupled: PretrainConfig, tmp_path: Path) -> None:
    """At world sizes 1 and 2, with the gradients of two parts averaged; the rest of the network learns."""
    config = replace(
        uncoupled,
        objective=replace(uncoupled.objective, freeze_epochs=100.0),
        optimizer=OptimizerConfig(lr_batch=16, weight_decay=0.5, warmup_epochs=0),
        accumulate=2,
    )
    save_config(config, tmp_path / "config.json")
    ranks = two_ranks(str(tmp_path / "config.json"), str(tmp_path / "ranks"), "new")
    pretrain(config, tmp_path / "one")
    finish(ranks, 200)
    torch.manual_seed(config.seed)
    first = build_objective(config.objective, config.backbone, Length(3, 1.0)).state_dict()
    for run in ("one", "ranks"):
        learned = weights(tmp_path / run)
        same = {name for name, value in learned.items() if name in first and torch.equal(value, first[name])}
        assert "online.projector.last_KD" in same and "online.projector.layers.0.weight" not in same


def test_a_share_of_the_images_trains_on_the_pair_that_random_training_takes(
    tiny: PretrainConfig, tmp_path: Path
) -> None:
    def run(name: str, **selection: object) -> dict[str, np.ndarray]:
        config = replace(tiny, selection=replace(tiny.selection, **selection))
        pretrain(config, tmp_path / name)
        return rows(tmp_path / name)

    random, mixed = run("random", rule="random"), run("mixed", random_share=0.5, audit_every=1)
    best_B = mixed["loss_BP"].argmax(1)
    at_random_B = mixed["at_random_B"]
    assert 0.3 < at_random_B.mean() < 0.7  # half of 96 images, with a standard deviation of 0.05
    np.testing.assert_array_equal(mixed["choice_B"][~at_random_B], best_B[~at_random_B])
    np.testing.assert_array_equal(mixed["choice_B"][at_random_B], random["choice_B"][at_random_B])
    assert not random["at_random_B"].any()  # whose steps choose no pair by the rule
    assert curve(tmp_path / "mixed", "selection/agreement") == [1.0] * 3  # the judge's choice is what is audited
    everything = run("everything", random_share=1.0)
    np.testing.assert_array_equal(everything["choice_B"], random["choice_B"])
    assert everything["at_random_B"].all() and np.isfinite(everything["loss_BP"]).all()


@pytest.mark.parametrize("layer", [None, 1])
def test_the_target_scores_all_images(tiny: PretrainConfig, tmp_path: Path, layer: int | None) -> None:
    tiny = replace(tiny, backbone=replace(tiny.backbone, depth=2))
    changes = {"random": {"rule": "random"}, "target": {"encoder": "target", "layer": layer, "audit_every": 1}}
    for name, change in changes.items():
        pretrain(replace(tiny, selection=replace(tiny.selection, **change)), tmp_path / name)
    random, target = rows(tmp_path / "random"), rows(tmp_path / "target")
    assert np.isfinite(target["loss_BP"]).all()
    at_random_B, best_B = target["at_random_B"], target["loss_BP"].argmax(1)
    assert 0.05 < at_random_B.mean() < 0.5  # a quarter, with a standard deviation of 0.04
    np.testing.assert_array_equal(target["choice_B"], np.where(at_random_B, random["choice_B"], best_B))
    for metric in ("train/loss", "selection/regret", "selection/gain", "selection/gain/real"):
        assert len(curve(tmp_path / "target", metric)) == 3 and np.isfinite(curve(tmp_path / "target", metric)).all()


def test_ranks_tell_each_other_to_stop_in_the_one_sum_of_a_step(
    uncoupled: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank's request comes with the mean of loss and norm; there is no other exchange between the steps."""
    sums: list[torch.Tensor] = []

    def mean(world: World, values: torch.Tensor) -> torch.Tensor:
        if values.shape == (3,):
            sums.append(values)
            return values if len(sums) < 2 else values + torch.tensor([0.0, 0.0, 0.5])  # one of two ranks asks
        return values

    monkeypatch.setattr(World, "mean", mean)
    assert pretrain(uncoupled, tmp_path / "run") == "interrupted"
    assert [float(values[2]) for values in sums] == [0.0, 0.0]
    assert RunFolder(tmp_path / "run").read_state()["step"] == 2
