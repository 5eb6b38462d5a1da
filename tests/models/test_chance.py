"""The chance level that each objective knows is its loss where embeddings tell nothing apart."""

import math

import pytest
import torch

from models.heads import unit
from models.negatives import NegativesConfig
from models.objectives import OBJECTIVES

from .objective_cases import built, crops_for

FIRST = torch.zeros(5, dtype=torch.int64)
WIDE = 4096  # random unit rows are then nearly orthogonal
MIXED = NegativesConfig(4, 6, 0, 5, 0, 0, 0, start_epoch=0, last_epochs_without=0)


def embed(objective, name, monkeypatch, rows):
    """Puts `rows(n)` in place of all embeddings of a contrastive objective."""
    if name == "simclr":
        monkeypatch.setattr(objective.online, "head", lambda features: rows(len(features)))
    else:
        monkeypatch.setattr(objective, "embeddings", lambda chosen: tuple(rows(5) for _ in range(4)))


def loss_of(objective, crops):
    return float(objective.loss(objective.take(crops, FIRST, None))[0].detach())


@pytest.mark.parametrize("name", ["moby", "moco_v3", "simclr"])
def test_random_unit_embeddings_have_the_chance_loss(name, monkeypatch):
    objective = built(name, width=WIDE)
    embed(objective, name, monkeypatch, lambda n: unit(torch.randn(n, WIDE)))
    assert loss_of(objective, crops_for(name)) == pytest.approx(objective.chance(5), rel=0.03)


@pytest.mark.parametrize("name", ["moby", "moco_v3", "simclr"])
@pytest.mark.parametrize("share", [None, 0.6])
def test_synthetic_negatives_count_while_they_are_used(name, share, monkeypatch):
    mixed = NegativesConfig(**{**vars(MIXED), "share": share})
    objective, plain = built(name, negatives=mixed), built(name)
    one_12 = unit(torch.ones(12))
    embed(objective, name, monkeypatch, lambda n: one_12.expand(n, 12).clone())
    if name == "moby":
        objective.queue1.rows_KD[:] = objective.queue2.rows_KD[:] = one_12
    assert loss_of(objective, crops_for(name)) == pytest.approx(objective.chance(5), rel=1e-4)
    assert objective.chance(5) > plain.chance(5)


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_uniform_predictions_have_the_chance_loss(name):
    objective = built(name)
    with torch.no_grad():
        last = objective.prototypes_KD if name == "swav" else objective.online.projector.last_KD
        last.copy_(last[:1].expand_as(last).clone())
    assert loss_of(objective, crops_for(name)) == pytest.approx(objective.chance(5), rel=1e-4)


def test_ibot_adds_the_masked_patches():
    objective = built("ibot", mask_probability=1.0, mask_share=0.5, mask_variation=0.0)
    with torch.no_grad():
        last = objective.online.projector.last_KD
        last.copy_(last[:1].expand_as(last).clone())
    assert loss_of(objective, crops_for("ibot")) == pytest.approx(objective.chance(5), rel=1e-4)
    assert built("ibot", mask_probability=0.0).chance(5) == pytest.approx(math.log(24))


def test_without_negatives_or_clusters_the_loss_cannot_tell():
    assert {name for name in OBJECTIVES if built(name).chance(5) is None} == {"byol", "simsiam"}
    assert built("moby", queue=1024).chance(5) == pytest.approx(13.8649, abs=1e-4)
