"""Measures against scikit-learn, torch.optim and naive loops."""

import numpy as np
import pytest
import sklearn.metrics
import timm
import torch
import torch.nn.functional as F

from jobs.evaluation import linear, metrics
from jobs.evaluation.attention import attention_maps, overlay
from jobs.evaluation.frozen import Frozen, pooled, timm_module
from jobs.evaluation.gradcam import grad_cam, prototype_score, self_score
from jobs.evaluation.retrieval import mean_average_precision
from jobs.evaluation.splits import subset
from shards.errors import InputError


def guesses(rng: np.random.Generator, images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    scores = rng.normal(size=(images, classes))
    return scores, np.argsort(-scores, axis=1)


@pytest.mark.parametrize("classes", [2, 5, 6, 12])
def test_accuracy_and_confusion_equal_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    scores, best = guesses(rng, 200, classes)
    labels = rng.integers(0, classes, 200)
    got = metrics.summarize(best, labels, [str(i) for i in range(classes)])
    assert got["scores"]["top1"] == pytest.approx(sklearn.metrics.accuracy_score(labels, best[:, 0]))
    every = np.arange(classes)
    if classes > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, scores, k=5, labels=every)
        assert got["scores"]["top5"] == pytest.approx(top5)
    else:
        assert "top5" not in got["scores"]
    expected = sklearn.metrics.confusion_matrix(labels, best[:, 0], labels=every)
    assert got["confusion"] == expected.tolist()
    recalls = sklearn.metrics.recall_score(labels, best[:, 0], labels=every, average=None, zero_division=0.0)
    named = {row["class"]: row["top1"] for row in got["per_class"]}
    assert named == pytest.approx({str(i): recalls[i] for i in range(classes) if (labels == i).any()})


def test_seeds_give_mean_and_sample_deviation() -> None:
    merged = metrics.over_seeds([{"top1": 0.5}, {"top1": 0.6}, {"top1": 0.7}])
    assert merged == pytest.approx({"top1": 0.6, "top1_deviation": 0.1})
    assert metrics.over_seeds([{"top1": 0.5}]) == {"top1": 0.5}


def test_subsets_are_stratified_nested_and_seeded() -> None:
    labels = np.repeat([0, 1, 2, -1], [100, 50, 7, 20])
    tenth = subset(labels, share=0.1, seed=3)
    assert np.bincount(labels[tenth]).tolist() == [10, 5, 1]
    assert set(subset(labels, share=0.01, seed=3)) <= set(tenth)
    assert (subset(labels, share=0.1, seed=3) == tenth).all()
    assert (subset(labels, share=0.1, seed=4) != tenth).any()
    assert np.bincount(labels[subset(labels, shots=5)]).tolist() == [5, 5, 5]
    assert len(subset(labels)) == 157
    for wrong in ({"share": 0}, {"share": 1.5}, {"shots": -1}, {"shots": 8}):
        with pytest.raises(InputError):
            subset(labels, **wrong)


@pytest.mark.parametrize("chunk", [3, 64])
def test_mean_average_precision_equals_scikit_learn(chunk: int) -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (torch.from_numpy(rng.normal(size=(n, 8))) for n in (20, 60))
    labels = torch.from_numpy(rng.integers(0, 4, 60))
    asked = torch.from_numpy(rng.integers(0, 5, 20))  # class 4 has nothing relevant
    similarity = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    expected = [
        sklearn.metrics.average_precision_score((labels == y).numpy(), row.numpy())
        for row, y in zip(similarity, asked, strict=True)
        if y < 4
    ]
    got = mean_average_precision(queries, asked, gallery, labels, chunk)
    assert got == pytest.approx(np.mean(expected), abs=1e-6)
    with pytest.raises(ValueError, match="no query"):
        mean_average_precision(queries, torch.full((20,), 9), gallery, labels)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_every_linear_layer_of_the_bank_learns_as_it_would_alone(decay: float) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(40, 6) * 3 + 1, torch.randint(0, 3, (40,))
    config = linear.LinearConfig(epochs=3, batch=16, rates=(0.1, 1.0, 4.0), weight_decay=decay)
    mean, std = linear.statistics(features)
    bank = linear.LinearBank(config, mean, std, 3)
    batches, steps = linear.cached_batches(features, labels, 16, seed=5)
    linear.train(bank, 3, steps, batches)
    for r, rate in enumerate(config.rates):
        alone = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(alone.weight)
        torch.nn.init.zeros_(alone.bias)
        optimizer = torch.optim.SGD(alone.parameters(), lr=rate * 16 / 256, momentum=0.9, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * steps)
        for epoch in range(3):
            for x, y in batches(epoch):
                optimizer.zero_grad()
                F.cross_entropy(alone((x - mean) / std), y).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(bank.weight_RCD[r], alone.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bank.bias_RC[r], alone.bias.detach(), rtol=1e-4, atol=1e-5)
        expected = alone((features - mean) / std).topk(3, dim=1).indices
        assert (bank.predict(features)[r] == expected).all()


def test_bank_reports_cross_entropy_and_survives_a_rate_that_diverges() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(32, 4), torch.randint(0, 2, (32,))
    bank = linear.LinearBank(linear.LinearConfig(rates=(1.0, 1e30)), *linear.statistics(features), 2)
    assert bank.step(features, labels, 0.0).tolist() == pytest.approx([np.log(2)] * 2, abs=1e-6)
    for _ in range(5):
        bank.step(features, labels, 0.5)
    assert bank.predict(features).shape == (2, 32, 2)


def test_cached_batches_show_every_image_once_an_epoch_in_a_new_order() -> None:
    features, labels = torch.arange(10.0)[:, None], torch.arange(10)
    batches, steps = linear.cached_batches(features, labels, 4, seed=0)
    first, again, second = (torch.cat([y for _, y in batches(epoch)]) for epoch in (0, 0, 1))
    assert steps == 3
    assert sorted(first.tolist()) == list(range(10))
    assert (first == again).all()
    assert (first != second).any()


# Where a model looks


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape).eval()


@pytest.fixture(scope="module")
def crops() -> torch.Tensor:
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_attention_is_what_the_layer_computes(vit: torch.nn.Module, crops: torch.Tensor) -> None:
    maps = attention_maps(vit, crops)
    layer = vit.blocks[-1].attn
    held = []
    handle = layer.attn_drop.register_forward_hook(lambda module, inputs, output: held.append(inputs[0]))
    layer.fused_attn = False
    vit(crops)
    handle.remove()
    layer.fused_attn = True
    torch.testing.assert_close(maps, held[0].mean(1)[:, 0, 1:].reshape(2, 3, 3))


def test_attention_without_class_token_and_without_attention(crops: torch.Tensor) -> None:
    shape = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="avg", **shape)
    maps = attention_maps(plain, crops)
    assert maps.sum((1, 2)).tolist() == pytest.approx([1, 1])
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, img_size=32, window_size=2, depths=(1, 1),
                             embed_dim=12, num_heads=(1, 2))  # fmt: skip
    with pytest.raises(InputError, match="SwinTransformer"):
        attention_maps(swin, crops)
    assert grad_cam(swin, torch.randn(1, 3, 32, 32), self_score).shape == (1, 4, 4)


def test_grad_cam_equals_its_definition(vit: torch.nn.Module, crops: torch.Tensor) -> None:
    prototypes, labels = torch.randn(3, 32), torch.tensor([2, 0])
    score = prototype_score(prototypes, labels)
    tokens = vit.pos_drop(vit._pos_embed(vit.patch_embed(crops)))
    tokens = vit.blocks[0](tokens).detach().requires_grad_()
    features = vit.norm(vit.blocks[1](tokens))[:, 0]
    expected_score = F.cosine_similarity(features, prototypes[labels])
    (slope,) = torch.autograd.grad(expected_score.sum(), tokens)
    for b in range(2):
        raw = torch.zeros(9)
        for t in range(9):
            for d in range(32):
                raw[t] += slope[b, 1:, d].mean() * tokens[b, 1 + t, d].detach()
        raw = raw.relu()
        got = grad_cam(vit, crops, score)[b].flatten()
        torch.testing.assert_close(got, raw / raw.max().clamp_min(1e-12), rtol=1e-4, atol=1e-5)


def test_grad_cam_leaves_no_hook_and_no_gradient(vit: torch.nn.Module, crops: torch.Tensor) -> None:
    before = vit(crops)
    grad_cam(vit, crops, self_score)
    assert all(p.grad is None for p in vit.parameters())
    torch.testing.assert_close(vit(crops), before)


def test_overlay_brightens_where_the_map_is_high() -> None:
    image = np.full((16, 16, 3), 100, np.uint8)
    shown = overlay(image, np.array([[0.0, 0.0], [0.0, 1.0]]))
    assert shown.shape == image.shape
    assert shown[-1, -1].sum() > shown[0, 0].sum()
    assert overlay(image, np.zeros((2, 2))).std() < 60  # a flat map draws a flat picture, without a division by 0


@pytest.mark.parametrize(("pool", "width"), [("default", 32), ("cls", 32), ("mean", 32), ("cls+mean", 64)])
def test_pooling(vit: torch.nn.Module, crops: torch.Tensor, pool: str, width: int) -> None:
    tokens = vit.forward_features(crops)
    expected = {
        "default": vit(crops),
        "cls": tokens[:, 0],
        "mean": tokens[:, 1:].mean(1),
        "cls+mean": torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1),
    }
    got = pooled(vit, crops, pool)
    assert got.shape == (2, width)
    torch.testing.assert_close(got, expected[pool])


def test_pooling_refuses_what_a_model_lacks(crops: torch.Tensor) -> None:
    with pytest.raises(InputError, match="no timm model"):
        timm_module(torch.nn.Linear(2, 2))
    resnet = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(InputError, match="class token"):
        pooled(resnet.eval(), crops, "cls")
    # The mean over a convolutional map is what its own pooling does.
    torch.testing.assert_close(pooled(resnet, crops, "mean"), resnet(crops))


def test_identity_follows_every_weight_and_setting(vit: torch.nn.Module) -> None:
    first = Frozen(vit, "a", 24).identity()
    assert Frozen(vit, "b", 24).identity() == first
    assert Frozen(vit, "a", 24, "cls").identity() != first
    assert Frozen(vit, "a", 32).identity() != first
    with torch.no_grad():
        vit.norm.bias[3] += 1e-6
    assert Frozen(vit, "a", 24).identity() != first
