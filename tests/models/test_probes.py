"""Probes of features and of contrastive tasks against loops and known cases."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.contrast import Contrast, info_nce
from models.negatives import NegativesConfig, draw
from models.probes import (
    alignment,
    contrast_report,
    feature_std,
    matching_probabilities,
    positives_report,
    rankme,
    relative_alignment,
    task_statistics,
    uniformity,
    weighted_knn,
)

from .objective_cases import CONFIGS, built, crops_for
from .toys import SIX, unit_rows


def task(synthetic=SIX, barred=None, images=6):
    labels = torch.tensor([0, 1, 2, 0, 1, -1])[:images]
    return Contrast(
        unit_rows(images, 8),
        unit_rows(images, 8),
        unit_rows(30, 8),
        0.2,
        synthetic,
        labels,
        torch.arange(30) % 4,
        barred,
    )


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
def test_weighted_knn_equals_a_loop(chunk, monkeypatch):
    monkeypatch.setattr("models.probes.CHUNK_ELEMENTS", chunk)
    train, labels, test = torch.randn(40, 6), torch.randint(3, (40,)), torch.randn(9, 6)
    votes = weighted_knn(train, labels, test, 3, (1, 5, 100), 0.1)
    for k in (1, 5, 100):
        for row in range(9):
            similarity = F.cosine_similarity(test[row, None], train)
            nearest = similarity.max()
            wanted = torch.full((3,), -1.0, dtype=torch.float64)
            for index in similarity.argsort(descending=True)[:k].tolist():
                wanted[labels[index]] = wanted[labels[index]].clamp_min(0) + ((similarity[index] - nearest) / 0.1).exp()
            torch.testing.assert_close(votes[k][row], wanted, rtol=1e-4, atol=1e-4)


def test_rankme_counts_dimensions_in_use():
    basis = torch.linalg.qr(torch.randn(200, 10))[0]
    assert rankme(basis) == pytest.approx(10, abs=0.01)
    assert rankme(basis[:, :3] @ torch.linalg.qr(torch.randn(8, 3))[0].T) == pytest.approx(3, abs=0.01)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=0.01)


def test_feature_std_tells_spread_from_collapse():
    assert feature_std(torch.randn(4000, 64)) == pytest.approx(64**-0.5, rel=0.02)
    assert feature_std(torch.ones(10, 4) * torch.rand(10, 1)) == pytest.approx(0, abs=1e-6)


def test_alignment_and_uniformity_equal_their_definitions():
    x, y = torch.randn(7, 5), torch.randn(7, 5)
    a, b = F.normalize(x, dim=1), F.normalize(y, dim=1)
    assert alignment(x, x) == 0
    torch.testing.assert_close(
        alignment(x, y), torch.stack([(p - q).norm() ** 2 for p, q in zip(a, b, strict=True)]).mean()
    )
    kernel = [(-2 * (a[i] - a[j]).norm() ** 2).exp() for i in range(7) for j in range(i)]
    torch.testing.assert_close(uniformity(x), torch.stack(kernel).mean().log())


def test_matching_probabilities_descend_and_come_from_the_softmax():
    t = task()
    curve = matching_probabilities(t, 10)
    whole = (t.q_BD @ t.negatives_KD.T / 0.2).softmax(1).sort(descending=True).values
    torch.testing.assert_close(curve, whole[:, :10])
    assert matching_probabilities(t).shape == (6, 30)


def test_task_statistics_equal_a_loop():
    t = replace(task(), synthetic=None)
    found = task_statistics(t, count=7)
    for row in range(6):
        similarity = t.negatives_KD @ t.q_BD[row]
        assert found["proxy"][row] == float(t.q_BD[row] @ t.k_BD[row] > similarity.max())
        nearest = similarity.argsort(descending=True)[:7]
        if t.labels_B[row] < 0:
            assert found["false_negatives"][row].isnan()
        else:
            share = (t.negative_labels_K[nearest] == t.labels_B[row]).float().mean()
            torch.testing.assert_close(found["false_negatives"][row], share)
    assert "proxy_synthetic" not in found


def test_components_of_synthetic_negatives_are_looked_up_one_by_one():
    t = task(NegativesConfig(10, 2, 0, 3, 0, 1, 0))
    torch.manual_seed(8)
    found = task_statistics(t)
    torch.manual_seed(8)
    drawn = draw(t.synthetic, t.q_BD @ t.negatives_KD.T, 8)
    for row in range(5):
        same = (t.negative_labels_K == t.labels_B[row]).float()
        first, partner = same[drawn.index_BL[row]], same[drawn.partner_BL[row]]
        either = [first[0], first[1], *torch.maximum(first[2:5], partner), first[5]]
        torch.testing.assert_close(found["false_components"][row], torch.stack(either).mean())
        torch.testing.assert_close(found["false_pairs"][row], (first[2:5] * partner).mean())
    assert found["false_components"][5].isnan()


def test_statistics_leave_the_generator_alone_and_agree_with_the_loss():
    t = task()
    torch.manual_seed(4)
    _, metrics = info_nce(t.q_BD, t.k_BD, t.negatives_KD, 0.2, SIX)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    found = task_statistics(t)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("proxy", "proxy_synthetic"):
        assert found[name].mean() == metrics[name]


def test_the_oracle_has_no_false_negatives_among_the_hardest_nor_in_synthetic_ones():
    t = task(NegativesConfig(5, 4, 0, 4, 0, 0, 0))
    barred = t.labels_B[:, None] == t.negative_labels_K
    found = task_statistics(replace(t, barred_BK=barred), count=10)
    for name in ("false_negatives", "false_components", "false_pairs"):
        assert found[name][:5].abs().max() == 0


def test_report_by_source():
    sources = torch.tensor([0, 0, 1, 0, 1, 1])
    one, other = task(), task()
    scalars, curves = contrast_report([one, other], sources, ("real", "synthetic"))
    for name, own in {"proxy": slice(None), "proxy/real": sources == 0, "proxy/synthetic": sources == 1}.items():
        values = [task_statistics(t)["proxy"][own].mean() for t in (one, other)]
        torch.testing.assert_close(scalars[name], torch.stack(values).mean())
    wanted = matching_probabilities(one)[sources == 0].mean(0) + matching_probabilities(other)[sources == 0].mean(0)
    torch.testing.assert_close(curves["matching_probabilities/real"], wanted / 2)
    assert not scalars["false_negatives/synthetic"].isnan()  # an unknown class does not make the mean unknown


def compared(name, objective, x1, x2):
    """Pairs of embeddings that the paper's loss compares, in both directions."""
    if name == "simsiam":
        z1, z2 = (objective.online.projector(objective.online.backbone(x)) for x in (x1, x2))
        return (objective.online.predictor(z1), z2), (objective.online.predictor(z2), z1)
    if name in ("simclr", "swav"):
        z1, z2 = objective.online(x1), objective.online(x2)
        return (z1, z2), (z2, z1)
    if name in ("dino", "ibot"):  # what the head makes unit rows of, before its last layer
        q1, q2 = (objective.online.projector.layers(objective.online.backbone(x)) for x in (x1, x2))
        k1, k2 = (objective.target.projector.layers(objective.target.backbone(x)) for x in (x1, x2))
    else:
        q1, q2, k1, k2 = (encoder(x) for encoder in (objective.online, objective.target) for x in (x1, x2))
    return (q1, k2), (q2, k1)


def on_sphere(row):
    return row / row.square().sum().sqrt()


@pytest.mark.parametrize("name", CONFIGS)
def test_alignment_and_uniformity_of_what_an_objective_compares(name):
    """Wang & Isola (2020), equations 1 and 2 with their α = 2 and t = 2, pair by pair; in all and by source."""
    objective = built(name, **({"mask_probability": 0.0} if name == "ibot" else {}))
    chosen = objective.take(crops_for(name, batch=6), torch.zeros(6, dtype=torch.int64), None)
    with torch.no_grad():
        pairs = compared(name, objective, *chosen.crops[0].unbind(1))
    objective.loss(chosen)
    assert objective.positives == []
    objective.watching = True
    objective.loss(chosen)[0].backward()
    assert all(not rows.requires_grad for pair in objective.positives for rows in pair)
    sources = torch.tensor([0, 1, 0, 0, 1, 2])  # of the last source, one image is too few
    found = positives_report(objective.positives, sources, ("real", "synthetic", "rare"))
    images = {"": range(6), "/real": (0, 2, 3), "/synthetic": (1, 4)}
    kinds = ("alignment", "relative_alignment", "uniformity")
    assert found.keys() == {f"{kind}{suffix}" for kind in kinds for suffix in images}
    for suffix, own in images.items():
        distances, potentials, shares = [], [], []
        for first, second in pairs:
            apart = {(i, j): (on_sphere(first[i]) - on_sphere(second[j])).square().sum() for i in own for j in own}
            same = [distance for (i, j), distance in apart.items() if i == j]
            other = [distance for (i, j), distance in apart.items() if i != j]
            distances += same
            shares.append(torch.stack(same).mean() / torch.stack(other).mean())
            kernel = [
                (-2 * (on_sphere(first[i]) - on_sphere(first[j])).square().sum()).exp()
                for i in own
                for j in own
                if i < j
            ]
            potentials.append(torch.stack(kernel).mean().log())
        torch.testing.assert_close(found[f"alignment{suffix}"], torch.stack(distances).mean(), rtol=1e-4, atol=1e-5)
        share = found[f"relative_alignment{suffix}"]
        torch.testing.assert_close(share, torch.stack(shares).mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"uniformity{suffix}"], torch.stack(potentials).mean(), rtol=1e-4, atol=1e-5)
    objective.watching = False
    objective.loss(chosen)
    assert objective.positives == []


def test_relative_alignment_of_pairs_that_are_one_tell_nothing_or_all_are_one():
    rows = unit_rows(500, 64)
    assert relative_alignment(rows, rows) == 0
    assert relative_alignment(rows, unit_rows(500, 64)) == pytest.approx(1, abs=0.02)
    assert relative_alignment(rows[:1].expand(5, 64), rows[:1].expand(5, 64)).isnan()


@pytest.mark.parametrize("name", CONFIGS)
def test_watching_changes_nothing_that_is_learned(name):
    objective = built(name)
    other, chosen = copy.deepcopy(objective), objective.take(crops_for(name), torch.zeros(5, dtype=torch.int64), None)
    other.watching = True
    for one in (objective, other):
        torch.manual_seed(1)
        one.loss(chosen)[0].backward()
        one.after_step()
    for p, q in zip(objective.parameters(), other.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    one, two = objective.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one if torch.is_tensor(one[n]))
