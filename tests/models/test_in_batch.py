"""Contrast within the batch against naive loops: the loss, synthetic negatives, the oracle and what is analysed."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from jobs.benches.obvious import naive_similarities
from models.contrast import contrastive_loss
from models.in_batch import batch_contrast
from models.negatives import NegativesConfig, draw
from models.probes import matching_probabilities, task_statistics

from .objective_cases import built, crops_for
from .toys import SIX, unit_rows

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, -1])
IMAGES = len(LABELS)
FIRST = torch.zeros(5, dtype=torch.int64)


def case(sets=1, **settings):
    """A task of 7 images; with two sets, rows are MoCo v3's keys or SimCLR's two views."""
    rows = [unit_rows(IMAGES, 12) for _ in range(sets)]
    return batch_contrast(unit_rows(IMAGES, 12), rows[0], rows, 0.2, labels_B=LABELS, labelled=True, **settings)


def kept(task, image, sets, oracle):
    """Numbers of the negatives that an image has, by a loop over all rows."""
    found = []
    for number in range(sets * IMAGES):
        other = number % IMAGES
        same = LABELS[other] == LABELS[image] and LABELS[image] >= 0
        if other != image and not (oracle and same):
            found.append(number)
    return found


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("sets", [1, 2])
def test_loss_and_metrics_equal_a_loop_over_images(sets, oracle):
    task = case(sets, oracle=oracle)
    loss, metrics = contrastive_loss([task])
    losses, ranked = [], []
    for image in range(IMAGES):
        others = task.negatives_KD[kept(task, image, sets, oracle)] @ task.q_BD[image]
        positive = task.q_BD[image] @ task.k_BD[image]
        terms = torch.cat([positive[None], others]) / 0.2
        losses.append(terms.logsumexp(0) - terms[0])
        ranked.append((positive > others).all())
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert metrics["proxy"] == torch.stack(ranked).float().mean()


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("gradient", ["dot", "cosine"])
def test_synthetic_negatives_of_the_batch_equal_built_ones_and_are_constant(gradient, oracle):
    """Both views carry a gradient, as in SimCLR: it flows through real negatives, and stops at synthetic ones."""
    config = replace(SIX, hardest=6, gradient=gradient)
    rows, found = torch.randn(2, IMAGES, 12), []
    for naive in (False, True):
        leaf = rows.clone().requires_grad_()
        z1, z2 = F.normalize(leaf, dim=2)
        task = batch_contrast(z1, z2, [z2, z1], 0.2, config, LABELS, oracle=oracle)
        torch.manual_seed(3)
        if naive:
            drawn = draw(config, task.q_BD @ task.negatives_KD.T, 12, task.barred_BK)
            made = naive_similarities(config, task.q_BD, task.negatives_KD.detach(), drawn)
            losses = []
            for image in range(IMAGES):
                others = task.negatives_KD[kept(task, image, 2, oracle)] @ z1[image]
                terms = torch.cat([(z1[image] @ z2[image])[None], others, made[image]]) / 0.2
                losses.append(terms.logsumexp(0) - terms[0])
            loss = torch.stack(losses).mean()
        else:
            loss, _ = contrastive_loss([task])
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("oracle", [False, True])
def test_synthetic_negatives_are_made_of_what_is_left_alone(oracle):
    """As many hardest are asked for as there are rows: an image's own and, with the oracle, its class's never come."""
    task, config = case(2, oracle=oracle), NegativesConfig(14, *(40,) * 6)
    drawn = draw(config, task.q_BD @ task.negatives_KD.T, 12, task.barred_BK)
    for image in range(IMAGES):
        wanted = set(kept(task, image, 2, oracle))
        assert set(drawn.index_BL[image].tolist()) == wanted
        assert set(drawn.partner_BL[image].tolist()) <= wanted


def test_of_few_left_the_hardest_are_picked():
    task, config = case(2, oracle=True), NegativesConfig(3, *(40,) * 6)
    similarity = task.q_BD @ task.negatives_KD.T
    drawn = draw(config, similarity, 12, task.barred_BK)
    for image in range(IMAGES):
        left = kept(task, image, 2, True)
        hardest = sorted(left, key=lambda number: -similarity[image, number])[:3]
        assert set(drawn.index_BL[image].tolist()) == set(hardest)


def test_an_image_without_negatives_loses_nothing_and_says_nothing():
    rows = unit_rows(3, 8).requires_grad_()
    labels = torch.tensor([5, 5, 5])
    task = batch_contrast(rows, rows, [rows], 0.2, replace(SIX, hardest=2), labels, oracle=True)
    loss, metrics = contrastive_loss([task])
    loss.backward()
    assert loss == 0 and rows.grad.abs().max() == 0 and metrics["proxy"] == metrics["proxy_synthetic"] == 1
    assert matching_probabilities(task.detached()).abs().max() == 0
    found = task_statistics(task.detached())
    assert found["proxy_synthetic"].tolist() == [1, 1, 1]
    for name in ("false_negatives", "false_components", "false_pairs"):
        assert found[name].isnan().all()


@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize("count", [3, 1024])
def test_analyses_equal_a_loop_and_never_count_an_image_s_own_rows(count, oracle):
    sets = 2
    task = case(sets, synthetic=replace(SIX, hardest=4), oracle=oracle)
    torch.manual_seed(8)
    found, curve = task_statistics(task, count), matching_probabilities(task, count)
    torch.manual_seed(8)
    drawn = draw(task.synthetic, task.q_BD @ task.negatives_KD.T, 12, task.barred_BK)
    made = naive_similarities(task.synthetic, task.q_BD, task.negatives_KD, drawn)
    classes = LABELS.repeat(sets)
    for image in range(IMAGES):
        left = kept(task, image, sets, oracle)
        similarity = task.negatives_KD[left] @ task.q_BD[image]
        nearest = similarity.argsort(descending=True)[:count]
        probabilities = (similarity / 0.2).softmax(0)[nearest]
        torch.testing.assert_close(curve[image, : len(nearest)], probabilities)
        assert not curve[image, len(nearest) :].any()
        positive = task.q_BD[image] @ task.k_BD[image]
        assert found["proxy"][image] == (positive > similarity).all()
        assert found["proxy_synthetic"][image] == ((positive > similarity).all() & (positive > made[image]).all())
        if LABELS[image] < 0:
            assert found["false_negatives"][image].isnan() and found["false_components"][image].isnan()
            continue
        same = classes == LABELS[image]
        share = same[torch.tensor(left)[nearest]].float().mean()
        torch.testing.assert_close(found["false_negatives"][image], share)
        either = same[drawn.index_BL[image]]
        either[7:12] |= same[drawn.partner_BL[image]]  # SIX has 3 interpolations, 4 extrapolations, then 5 mixings
        torch.testing.assert_close(found["false_components"][image], either.float().mean())
    if oracle:
        assert found["false_negatives"][:-1].abs().max() == found["false_components"][:-1].abs().max() == 0
    else:
        assert found["false_negatives"][:-1].max() > 0


@pytest.mark.parametrize("name", ["moby", "moco_v3", "simclr"])
def test_contrastive_objectives_keep_their_tasks_while_they_are_watched(name):
    objective, labels = built(name), torch.tensor([0, 1, 0, 1, 2])
    chosen = objective.take(crops_for("plain"), FIRST, None)
    objective.loss(chosen, labels)
    assert objective.contrasts == []
    objective.watching = True
    loss, metrics = objective.loss(chosen, labels)
    first, second = objective.contrasts
    assert not first.q_BD.requires_grad and not first.negatives_KD.requires_grad
    again, found = contrastive_loss([first, second])
    factor = {"moby": 1, "moco_v3": 2 * objective.config.temperature, "simclr": 0.5}[name]
    torch.testing.assert_close(factor * again, loss.detach())
    assert found["proxy"] == metrics["proxy"]
    if name != "moby":
        assert torch.equal(first.negative_labels_K, labels.repeat(2 if name == "simclr" else 1))
        assert first.barred_BK.sum(1).tolist() == [2 if name == "simclr" else 1] * 5
        assert task_statistics(first)["false_negatives"].tolist() == [0.25, 0.25, 0.25, 0.25, 0]
    objective.watching = False
    objective.loss(chosen, labels)
    assert objective.contrasts == []


@pytest.mark.parametrize("name", ["moco_v3", "simclr"])
def test_objectives_learn_from_synthetic_negatives_of_the_batch(name):
    negatives = replace(SIX, hardest=4, start_epoch=1, last_epochs_without=0, of_epochs=None)
    objective = built(name, negatives=negatives)
    chosen = objective.take(crops_for("plain"), FIRST, None)
    _, before = objective.loss(chosen)
    objective.step = 5  # an epoch later
    plain = contrastive_loss([replace(task, synthetic=None) for task in watched(objective, chosen)])[0]
    loss, metrics = objective.loss(chosen)
    assert "proxy_synthetic" not in before and metrics["proxy_synthetic"] <= metrics["proxy"]
    assert loss > plain * {"moco_v3": 2 * objective.config.temperature, "simclr": 0.5}[name]
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.online.parameters())


def watched(objective, chosen, labels=None):
    objective.watching = True
    objective.loss(chosen, labels)
    objective.watching = False
    return objective.contrasts


@pytest.mark.parametrize("name", ["moby", "moco_v3", "simclr"])
def test_the_oracle_leaves_out_the_class_with_synthetic_negatives_too(name):
    objective = built(name, oracle=True, negatives=replace(SIX, hardest=4))
    labels = torch.tensor([0, 0, 1, 1, 1])
    if name == "moby":
        objective.queue1.labels_K.copy_(torch.arange(32) % 3)
        objective.queue2.labels_K.copy_(torch.arange(32) % 3)
    tasks = watched(objective, objective.take(crops_for("plain"), FIRST, None), labels)
    for task in tasks:
        found = task_statistics(task)
        assert found["false_negatives"].tolist() == found["false_components"].tolist() == [0] * 5
        assert task_statistics(replace(task, barred_BK=None))["false_components"].max() > 0


@pytest.mark.parametrize("name", ["moby", "moco_v3", "simclr"])
def test_the_oracle_without_labels_is_refused(name):
    objective = built(name, oracle=True)
    with pytest.raises(ValueError, match=r"objective.oracle: .* no labels are given; take labelled images or set it"):
        objective.loss(objective.take(crops_for("plain"), FIRST, None))


@pytest.mark.parametrize(("name", "others"), [("moco_v3", 4), ("simclr", 8)])
def test_more_hardest_than_other_images_are_refused_before_training(name, others):
    """Not only when synthetic negatives begin, epochs later."""
    objective = built(name, negatives=NegativesConfig(9, start_epoch=10))
    with pytest.raises(ValueError, match=f"hardest: 9 is more than the {others} negatives that 5 images at once give"):
        objective.check_batch(5)
    objective.check_batch(10)
    built(name).check_batch(2)  # without synthetic negatives
    with pytest.raises(ValueError, match="BatchNorm needs two images"):
        built(name).check_batch(1)


def test_more_hardest_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"negatives.hardest: 8 is more than the 7 negatives there are; lower it"):
        contrastive_loss([case(synthetic=replace(SIX, hardest=8))])
