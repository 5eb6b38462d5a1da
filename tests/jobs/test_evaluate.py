"""`hardviews evaluate` on small images: known answers, the same features from any source, one line for mistakes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_runs import TINY, backbone_at, image_folder, write_run
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from jobs import evaluate
from jobs.build import BuildConfig
from jobs.build import run as build
from jobs.evaluation.backbones import ModelConfig, load_frozen
from jobs.evaluation.features import extract_features
from jobs.evaluation.finetune import Classifier, FinetuneConfig, parameter_groups
from jobs.evaluation.images import align_labels, open_images
from jobs.evaluation.knn import knn_scores
from jobs.evaluation.loading import Loader, centre_crop, crop_and_flip
from jobs.evaluation.maps import MapsConfig, checkpoint_steps, draw_maps
from jobs.run.folder import RunFolder
from shards.errors import InputError


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("train") / "train", 8)


@pytest.fixture(scope="module")
def test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("test") / "test", 4, seed=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("runs") / "one")


def scores(run: RunFolder, name: str) -> dict:
    """The newest file of that name, which has its evaluation's identity behind it where another one was first."""
    newest = max(run.evaluation.glob(f"{name}*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def flags(run: RunFolder, train: Path, test: Path) -> list[str]:
    return ["--run", str(run.path), "--train", str(train), "--test", str(test), "--device", "cpu"]


# Features


def test_centre_crop_is_the_whole_middle_square() -> None:
    params = centre_crop(1.0)(np.arange(2), np.array([[20, 30], [31, 10]]))
    assert [getattr(params, name)[:, 0].tolist() for name in ("top", "left", "height", "width")] == [
        [0, 10], [5, 0], [20, 10], [20, 10],
    ]  # fmt: skip
    assert centre_crop(0.875)(np.arange(1), np.array([[32, 32]])).height.item() == 28


def test_crops_and_flips_are_pure_and_change_with_the_epoch() -> None:
    rows, sizes = np.arange(50), np.full((50, 2), 64)
    first, again = (crop_and_flip(3, 1, 32, (0.1, 1.0))(rows, sizes) for _ in range(2))
    other = crop_and_flip(3, 2, 32, (0.1, 1.0))(rows, sizes)
    assert first.shape == (50, 1)
    assert (first.top == again.top).all() and (first.height != other.height).any()
    assert 0 < first.flip.mean() < 1
    assert not first.jitter.any() and not first.gray.any()


def test_features_are_the_model_s_on_normalised_crops_in_any_batch(test: Path) -> None:
    model = backbone_at(2)
    features, labels, _ = extract_features(model, test, 16, torch.device("cpu"), batch=7)
    files = sorted(test.rglob("*.png"))
    assert labels.tolist() == [sorted({f.parent.name for f in files}).index(f.parent.name) for f in files]
    for row in (0, 5, 23):
        image = Image.open(files[row])
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        small = image.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BILINEAR)
        x = (torch.from_numpy(np.array(small)).float() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
            [0.229, 0.224, 0.225]
        )
        with torch.no_grad():
            expected = model(x.permute(2, 0, 1)[None])[0]
        assert (features[row] - expected).abs().max() < 0.05 * expected.std()
    again, _, _ = extract_features(model, test, 16, torch.device("cpu"), batch=64)
    torch.testing.assert_close(again, features, rtol=1e-4, atol=1e-5)


def test_shards_and_folder_give_the_same_features(test: Path, tmp_path: Path) -> None:
    build(BuildConfig(f"imagefolder:{test}", tmp_path / "shards"))
    from_folder, labels, _ = extract_features(backbone_at(2), test, 16, torch.device("cpu"))
    from_shards, shard_labels, _ = extract_features(backbone_at(2), tmp_path / "shards", 16, torch.device("cpu"))
    order, shard_order = from_folder[:, 0].argsort(), from_shards[:, 0].argsort()
    torch.testing.assert_close(from_folder[order], from_shards[shard_order])
    assert (labels[order] == shard_labels[shard_order]).all()


def test_features_are_kept_and_follow_weights_and_images(test: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, _, _ = extract_features(backbone_at(2), test, 16, torch.device("cpu"), cache=cache)
    (kept,) = cache.iterdir()
    seen: list[int] = []
    again, _, _ = extract_features(backbone_at(2), test, 16, torch.device("cpu"), cache=cache, advance=seen.append)
    assert (again == first).all()
    assert seen == [24]
    extract_features(backbone_at(4), test, 16, torch.device("cpu"), cache=cache)
    assert len(list(cache.iterdir())) == 2
    assert kept.is_file()


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = image_folder(tmp_path / "images", 2, classes=2)
    (folder / "amber" / "000.png").write_bytes(b"no image")
    for _ in range(2):  # the second time from kept features
        _, labels, rows = extract_features(
            backbone_at(2), folder, 16, torch.device("cpu"), batch=2, cache=tmp_path / "kept"
        )
        assert labels.tolist() == [0, 1, 1]
        assert rows.tolist() == [1, 2, 3]
        assert "000.png is left out" in capsys.readouterr().err.replace("\n", "")
    for file in folder.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="no image of"):
        extract_features(backbone_at(2), folder, 16, torch.device("cpu"))


def test_damaged_features_are_computed_again(test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    first = extract_features(backbone_at(2), test, 16, torch.device("cpu"), cache=cache).features_nD
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    for content in (whole[:1000], b"", b"\xff" * len(whole)):
        kept.write_bytes(content)
        again = extract_features(backbone_at(2), test, 16, torch.device("cpu"), cache=cache).features_nD
        assert (again == first).all()
        assert "is damaged" in capsys.readouterr().err.replace("\n", " ")
        assert list(cache.iterdir()) == [kept]
        assert kept.read_bytes() == whole


def test_images_replaced_under_equal_names_sizes_and_times_are_others(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 2, classes=2)
    (path, other) = sorted((folder / "amber").iterdir())
    path.write_bytes(path.read_bytes().ljust(4000, b"\0"))
    before, times = open_images(folder).identity, path.stat()
    new = other.read_bytes().ljust(4000, b"\0")
    (folder / "new").write_bytes(new)
    (folder / "new").replace(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_images(folder).identity != before


def test_names_that_are_not_utf8_can_be_read_and_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 1, classes=2)
    (folder / "amber" / "000.png").rename(folder / "amber" / os.fsdecode(b"caf\xe9.png"))
    images = open_images(folder)
    assert isinstance(images.read([0])[0], np.ndarray)
    assert images.where(0).endswith(r"caf\xe9.png")


def test_rows_of_a_probe_are_those_of_its_images(run: RunFolder, train: Path, test: Path, tmp_path: Path) -> None:
    """An unlabelled and an unreadable image move the rows of all features after them."""
    folder = tmp_path / "train"
    shutil.copytree(train, folder)
    files = sorted(folder.rglob("*.png"))
    files[0].write_bytes(b"")
    shutil.copy(files[1], folder / "b.png")
    seen: list[int] = []
    real = Loader.batches

    def spy(self: Loader, rows: np.ndarray, *rest: object) -> object:
        seen.extend(rows.tolist())
        return real(self, rows, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobs.evaluation.protocols.Loader.batches", spy)
        common = ["--epochs", "1", "--batch", "16", "--validation", "0.25", "--no-cache"]
        evaluate.main(["linear", *flags(run, folder, test), *common])
    labels = open_images(folder).labels
    trained = seen[len(labels) + len(open_images(test).labels) :]
    assert len(trained) == len(set(trained)) == 35  # 47 readable ones with labels less a quarter of each class
    assert (labels[trained] >= 0).all() and 0 not in trained


def test_labels_are_matched_by_class_name(train: Path, tmp_path: Path) -> None:
    few = image_folder(tmp_path / "few", 1, classes=6)
    (few / "amber").rename(few / "zebra")
    aligned = align_labels(open_images(train), open_images(few))
    assert aligned.tolist() == [1, 2, 3, 4, 5, -1]


def test_classes_match_by_name_in_any_unicode_form_and_others_are_named(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (image_folder(tmp_path / name, 3, seed, classes=3) for seed, name in enumerate(("known", "new")))
    (train / "amber").rename(train / "caf\u00e9")
    (test / "amber").rename(test / "cafe\u0301")
    for folder in (train, test):  # between the two forms of é, so that it has another number in each
        (folder / "green").rename(folder / "cafz")
    assert align_labels(open_images(train), open_images(test)).tolist() == [0] * 3 + [2] * 3 + [1] * 3
    (test / "cafz").rename(test / "bird")
    shutil.copy(test / "bird" / "000.png", test / "loose.png")
    for kind in ("knn", "retrieval"):
        evaluate.main([kind, *flags(run, train, test), "--no-cache", "--out", str(tmp_path / "scores.json")])
        told = " ".join(capsys.readouterr().err.split())
        assert "3 images of" in told and "has no class bird" in told and "1 images of" in told
        kept = json.loads((tmp_path / "scores.json").read_text())
        assert kept["test"]["images"] == 6 and kept["test"]["listed"] == 10
    assert kept["scores"]["map"] > 0.5


def test_a_folder_is_walked_as_build_does(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 2, classes=2)
    for name in ("__MACOSX/a/._0.png", "amber/._0.png", "amber/.ipynb_checkpoints/0.png", "@eaDir/a/0.png", ".x/0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "amber" / "000.png", folder / name)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("amber", "blue"):
        (linked / name).symlink_to(folder / name)
    os.mkfifo(folder / "blue" / "pipe.png")
    (folder / "amber" / "gone.png").symlink_to(tmp_path / "nowhere")
    for root in (folder, linked):
        images = open_images(root)
        built = build(BuildConfig(f"imagefolder:{root}", tmp_path / "shards", keep_order=True, overwrite=True))
        assert images.classes == built.classes == ("amber", "blue")
        read = images.read(range(len(images.labels)))
        assert [isinstance(item, str) for item in read] == [False, False, True, False, False, True]
        assert len(built) == 4


def test_a_folder_s_images_are_shown_as_shards_are(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 2, classes=2)
    turned, half = Image.open(folder / "amber" / "000.png"), Image.open(folder / "blue" / "000.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.crop((0, 0, 20, 10)).save(folder / "amber" / "turned.jpg", exif=exif)
    half.putalpha(100)
    half.save(folder / "blue" / "half.png")
    build(BuildConfig(f"imagefolder:{folder}", tmp_path / "shards", keep_order=True))
    own, stored = open_images(folder), open_images(tmp_path / "shards")
    rows = range(len(own.labels))
    assert (own.labels == stored.labels).all()
    assert all(np.array_equal(a, b) for a, b in zip(own.read(rows), stored.read(rows), strict=True))


# kNN and the others


def test_knn_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    train, test = (torch.from_numpy(rng.normal(size=(n, 6))).float() for n in (80, 30))
    labels, truth = (torch.from_numpy(rng.integers(0, 7, n)) for n in (80, 30))
    got = knn_scores(train, labels, test, truth, [str(i) for i in range(7)], ks=(5, 20), temperature=0.5)
    for row in got["by_k"]:
        unit_train, unit_test = (torch.nn.functional.normalize(x, dim=1).numpy() for x in (train, test))
        judge = KNeighborsClassifier(row["k"], weights=lambda d: np.exp((1 - d**2 / 2) / 0.5), algorithm="brute").fit(
            unit_train, labels.numpy()
        )
        votes = judge.predict_proba(unit_test)
        best = judge.classes_[np.argsort(-votes, axis=1)]
        best[np.sort(-votes, axis=1) == 0] = -1  # a class without a vote is no guess
        assert row["top1"] == pytest.approx((best[:, 0] == truth.numpy()).mean())
        assert row["top5"] == pytest.approx((best[:, :5] == truth.numpy()[:, None]).any(1).mean())
    assert got["k"] == 20
    assert got["top1"] == got["by_k"][1]["top1"]


@pytest.mark.parametrize("temperature", [0.001, 0.011, 0.07, 100.0])
def test_knn_s_guesses_are_scikit_learn_s_classes_with_a_vote(temperature: float) -> None:
    """Also for k = 1, k above n, and classes that no training image has."""
    rng = np.random.default_rng(1)
    train, test = (torch.from_numpy(rng.normal(size=(n, 6))).float() for n in (40, 30))
    labels, truth = (torch.from_numpy(rng.integers(0, 7, n)) for n in (40, 30))
    got = knn_scores(train, labels, test, truth, [str(i) for i in range(9)], ks=(1, 3, 99), temperature=temperature)
    unit_train, unit_test = (torch.nn.functional.normalize(x, dim=1).double().numpy() for x in (train, test))
    for row in got["by_k"]:
        judge = KNeighborsClassifier(
            min(row["k"], 40), weights=lambda d: np.exp((d.min(1, keepdims=True) ** 2 - d**2) / 2 / temperature)
        ).fit(unit_train, labels.numpy())
        chances = judge.predict_proba(unit_test)
        near = judge.kneighbors(unit_test, return_distance=False)
        top1 = judge.classes_[chances.argmax(1)] == truth.numpy()
        assert row["top1"] == pytest.approx(top1.mean())
        if row["k"] <= 3:  # no more than five classes with a vote: top-5 are all of them
            voted = (labels.numpy()[near] == truth.numpy()[:, None]).any(1)
            assert row["top5"] == pytest.approx(voted.mean())


def test_knn_leaves_unlabelled_rows_out() -> None:
    features, labels = torch.eye(4), torch.tensor([0, 1, -1, 1])
    got = knn_scores(features, labels, features, labels, ["a", "b"], ks=(1,))
    assert got["top1"] == 1.0
    assert np.sum(got["confusion"]) == 3
    with pytest.raises(InputError, match="no labelled image"):
        knn_scores(features, torch.full((4,), -1), features, labels, ["a", "b"])


def test_knn_command_keeps_its_scores(
    run: RunFolder, train: Path, test: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(["knn", *flags(run, train, test), "--k", "5", "20"])
    assert "knn-step-4-test.json" in capsys.readouterr().out.replace("\n", "")
    kept = scores(run, "knn-step-4-test")
    assert kept["model"] == {"source": "run", "name": "one", "step": 4, "which": "online"}
    assert kept["scores"]["top1"] > 0.6
    assert [row["k"] for row in kept["by_k"]] == [5, 20]
    assert np.array(kept["confusion"]).sum() == kept["test"]["images"] == 24
    evaluate.main(["knn", *flags(run, train, test), "--step", "2", "--labels", "0.5", "--seeds", "3"])
    few = scores(run, "knn-step-2-test-50-percent")
    assert few["seeds"] == len(few["by_seed"]) == 3
    assert few["scores"]["top1"] == pytest.approx(np.mean([s["top1"] for s in few["by_seed"]]))
    evaluate.main(["knn", *flags(run, train, test), "--untrained", "--shots", "2"])
    assert scores(run, "knn-untrained-test-2-shot")["model"]["name"] == "untrained vit_tiny_patch16_224"


def test_pixels_are_features_too(run: RunFolder, train: Path, test: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["knn", *flags(run, train, test), "--pixels", "--size", "8"])
    assert scores(run, "knn-pixels-test")["model"] == {"source": "pixels", "name": "raw pixels", "step": None}
    frozen, _ = load_frozen(ModelConfig(run=run.path, pixels=True, size=8))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(frozen.features(images), images.reshape(2, 192))
    for other in (["--untrained"], ["--pool", "mean"]):
        with pytest.raises(InputError, match="pixels: "):
            evaluate.main(["knn", *flags(run, train, test), "--pixels", *other])
    with pytest.raises(InputError, match="pixels: "):
        evaluate.main(["finetune", *flags(run, train, test), "--pixels"])


def test_linear_probe_beats_chance_with_and_without_crops(run: RunFolder, train: Path, test: Path) -> None:
    evaluate.main(["linear", *flags(run, train, test), "--no-augment", "--epochs", "30", "--batch", "16"])
    kept = scores(run, "linear-step-4-test")
    assert kept["scores"]["top1"] > 0.8
    assert kept["picked_on"] == "test images"
    assert kept["scores"]["top1"] == max(row["top1"] for row in kept["by_rate"])
    common = [
        "--epochs",
        "4",
        "--batch",
        "16",
        "--rates",
        "0.3",
        "1",
        "--crop-scale",
        "0.5",
        "1",
        "--validation",
        "0.25",
    ]
    evaluate.main(["linear", *flags(run, train, test), *common, "--pool", "cls+mean"])
    kept = scores(run, "linear-step-4-test-cls-mean")
    assert kept["picked_on"] == "held-out training images"
    assert kept["scores"]["top1"] > 0.4


def test_finetuning_learns(run: RunFolder, train: Path, test: Path) -> None:
    common = ["--epochs", "6", "--warmup-epochs", "1", "--batch", "16", "--lr", "0.02", "--crop-scale", "0.5", "1"]
    evaluate.main(["finetune", *flags(run, train, test), *common])
    kept = scores(run, "finetune-step-4-test")
    assert kept["scores"]["top1"] > 0.5
    assert kept["config"]["layer_decay"] == 0.65


def test_finetuning_warms_up_as_long_as_configured_or_is_refused() -> None:
    config = FinetuneConfig(epochs=20, warmup_epochs=5, lr=1.0, batch=512)
    assert [config.rate(step, 400) for step in (0, 49, 99, 100, 250, 400)] == pytest.approx([0.02, 1, 2, 2, 1, 0])
    with pytest.raises(InputError, match="warmup_epochs: 5 is not within the 3 epochs of the run; lower it"):
        FinetuneConfig(epochs=3)


def test_layer_decay_falls_from_head_to_patches(run: RunFolder) -> None:
    frozen, _ = load_frozen(ModelConfig(run=run.path))
    model = Classifier(frozen, 24, 6)
    groups = parameter_groups(model, FinetuneConfig(layer_decay=0.5))
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == set(names.values())
    assert scale["head.weight"] == 1.0
    assert scale["backbone.blocks.1.mlp.fc1.weight"] == 2 * scale["backbone.blocks.0.mlp.fc1.weight"]
    assert scale["backbone.blocks.0.mlp.fc1.weight"] == 2 * scale["backbone.patch_embed.proj.weight"]
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay["backbone.blocks.0.mlp.fc1.weight"] == 0.05
    assert decay["backbone.blocks.0.mlp.fc1.bias"] == decay["backbone.pos_embed"] == 0.0


def test_retrieval_needs_labels_for_map_but_not_for_rankme(
    run: RunFolder, train: Path, test: Path, tmp_path: Path
) -> None:
    evaluate.main(["retrieval", *flags(run, train, test)])
    kept = scores(run, "retrieval-step-4-test")["scores"]
    assert 1 / 6 < kept["map"] <= 1
    assert 1 <= kept["rankme"] <= 24
    bare = tmp_path / "bare"
    bare.mkdir()
    for i, file in enumerate(train.rglob("*.png")):
        (bare / f"{i}.png").write_bytes(file.read_bytes())
    evaluate.main(["retrieval", *flags(run, bare, bare)])
    assert set(scores(run, "retrieval-step-4-bare")["scores"]) == {"rankme"}


def test_timm_models_without_a_network(train: Path, test: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    model = ["--timm", "test_vit", "--train", str(train), "--test", str(test), "--device", "cpu"]
    evaluate.main(["knn", *model, "--untrained", "--size", "32", "--out", str(out)])
    assert json.loads(out.read_text())["model"]["source"] == "untrained"
    with pytest.raises(InputError, match="not on this machine"):
        evaluate.main(["knn", *model])
    with pytest.raises(InputError, match="no model of timm"):
        evaluate.main(["knn", *model[2:], "--timm", "vit_tniy"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--k", "0"], "k: "),
        (["--temperature", "0"], "temperature: "),
        (["--labels", "2"], "labels: 2.0"),
        (["--shots", "99"], "shots: 99"),
        (["--seeds", "0"], "seeds: 0"),
        (["--step", "3"], "there are: 2, 4"),
        (["--train", "/nowhere"], "/nowhere does not exist"),
        (["--timm", "test_vit"], "either --run RUN or --timm"),
        (["--pool", "cls+mean", "--neighbours", "3"], "--neighbours"),
    ],
)
def test_mistakes_are_named(run: RunFolder, train: Path, test: Path, change: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("+", r"\+")):
        evaluate.main(["knn", *flags(run, train, test), *change])


def test_scores_of_other_protocols_are_kept_beside_each_other(
    tmp_path: Path, train: Path, test: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_run(tmp_path / "run")
    other = shutil.copytree(test, tmp_path / "other" / "test")
    next(other.rglob("*.png")).unlink()
    commands = (
        ["--test", str(test)], ["--test", str(other)], ["--k", "1"], ["--temperature", "0.5"], ["--step", "2"],
        ["--train", str(test)], ["--shots", "1"], ["--which", "target"], ["--forward-batch", "5"],
    )  # fmt: skip
    for change in commands:
        evaluate.main(["knn", *flags(own, train, test), *change])
    kept = {path.name: json.loads(path.read_text()) for path in own.evaluation.glob("*.json")}
    # The run has no target, so that all encoders are the online one; how fast it goes changes no score.
    assert len(kept) == len({content["identity"] for content in kept.values()}) == 7
    assert all(content["model"]["which"] == "online" for content in kept.values())
    for name, content in kept.items():
        plain = name in ("knn-step-4-test.json", "knn-step-2-test.json", "knn-step-4-test-1-shot.json")
        assert plain or name == f"knn-step-4-test-{content['identity']}.json"
    first = kept["knn-step-4-test.json"]["protocol"]
    assert (first["k"], first["temperature"], first["crop"], first["size"]) == ([10, 20, 100, 200], 0.07, 1.0, 16)
    assert first["test"]["images"] == 24 and first["train"]["fingerprint"] != first["test"]["fingerprint"]
    copied = open_images(shutil.copytree(test, tmp_path / "copy" / "test"))
    assert copied.fingerprint == first["test"]["fingerprint"]


def test_the_step_that_is_recorded_is_the_one_that_was_scored(tmp_path: Path) -> None:
    own = write_run(tmp_path / "run")
    (own.checkpoints / "step-00000004.pt").write_bytes(b"damaged")
    assert load_frozen(ModelConfig(run=own.path))[1]["step"] == 2


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("linear", ["--epochs", "0"], "epochs: 0 must be at least 1"),
        ("linear", ["--batch", "0"], "batch: 0 must be at least 1"),
        ("linear", ["--rates"], r"rates: \(\) must name"),
        ("linear", ["--momentum", "nan"], "momentum: nan must lie between 0 and 1"),
        ("linear", ["--validation", "1.0"], "validation: 1.0 must be at least 0 and below 1"),
        ("linear", ["--validation", "0.99", "--shots", "1", "--no-augment"], "validation: 0.99 leaves no image"),
        ("linear", ["--crop-scale", "0", "1"], "crop_scale: .* out of range"),
        ("finetune", ["--epochs", "0"], "epochs: 0 must be at least 1"),
        ("finetune", ["--batch", "-1"], "batch: -1 must be at least 1"),
        ("finetune", ["--smoothing", "2"], "smoothing: 2.0 must lie between 0 and 1"),
        ("knn", ["--temperature", "nan"], "temperature: nan is not finite"),
        ("knn", ["--labels", "0"], "labels: 0.0 is no share"),
        ("knn", ["--seeds", "0"], "seeds: 0 must be at least 1"),
        ("knn", ["--seeds", str(10**30)], "seeds: .* is too large"),
        ("retrieval", ["--size", "-1"], "size: -1 must be at least 0"),
        ("retrieval", ["--size", "1"], "size: one cannot take crops of 1 pixels"),
        ("retrieval", ["--size", str(10**12)], "size: one cannot take crops of 1000000000000 pixels"),
        ("knn", ["--out", ""], "out: . is a folder; give a file"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_is_computed(
    run: RunFolder, train: Path, test: Path, kind: str, change: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        evaluate.main([kind, *flags(run, train, test), *change])


def test_missing_labels_another_architecture_and_no_kind_are_named(
    run: RunFolder, test: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    Image.new("RGB", (20, 20)).save(bare / "a.png")
    with pytest.raises(InputError, match="has no labels"):
        evaluate.main(["knn", *flags(run, bare, test)])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no images"):
        evaluate.main(["knn", *flags(run, empty, test)])
    other = write_run(tmp_path / "other")
    config = json.loads(other.config.read_text())
    config["backbone"]["depth"] = 3
    other.config.write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not fit"):
        evaluate.main(["knn", *flags(other, test, test)])
    with pytest.raises(InputError, match="take one of knn, linear"):
        evaluate.main(["nearest"])
    evaluate.main([])
    assert "kinds: knn" in capsys.readouterr().out


# Maps


def test_maps_are_drawn_for_several_checkpoints(run: RunFolder, test: Path, tmp_path: Path) -> None:
    assert checkpoint_steps(run.path) == [2, 4]
    written = draw_maps(MapsConfig(run=run.path, images=str(test), count=2, out=tmp_path, device="cpu"))
    assert [path.name for path in written] == ["attention.png", "grad-cam.png"]
    for path in written:
        assert np.asarray(Image.open(path).convert("RGB")).std() > 10
    with pytest.raises(InputError, match="rows: "):
        draw_maps(MapsConfig(run=run.path, images=str(test), rows=(24,), out=tmp_path, device="cpu"))


def test_maps_fall_back_to_grad_cam_where_there_is_no_attention(tmp_path: Path, test: Path) -> None:
    resnet = replace(TINY, name="resnet10t", image_size=32, patch_size=None, width=None, depth=None, heads=None)
    run = write_run(tmp_path / "resnet", resnet)
    written = draw_maps(MapsConfig(run=run.path, images=str(test), count=1, steps=(4,), out=tmp_path, device="cpu"))
    assert [path.name for path in written] == ["grad-cam.png"]


# Data parallel


def test_two_processes_agree_with_one(run: RunFolder, train: Path, test: Path, tmp_path: Path) -> None:
    """Features are extracted by both and gathered; each step's gradient is the mean over both."""
    probe = ["--no-cache", "--no-augment", "--epochs", "5", "--batch", "16", "--rates", "0.3"]
    one, two = str(tmp_path / "one.json"), str(tmp_path / "two.json")
    command = ["linear", *flags(run, train, test), *probe, "--out"]
    evaluate.main([*command, one])
    script = tmp_path / "linear.py"
    script.write_text(f"from jobs import evaluate\nevaluate.main({[*command, two]!r})\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *torchrun], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = (json.loads(Path(path).read_text()) for path in (one, two))
    assert alone["confusion"] == together["confusion"]
    assert done.stdout.count("linear: one") == 1


def test_loader_keeps_order_and_names_broken_rows(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 3, classes=2)
    (folder / "blue" / "001.png").write_bytes(b"broken")
    images = open_images(folder)
    loader = Loader(images, 8, 4)
    batches = list(loader.batches(np.array([5, 4, 3, 2, 1, 0]), centre_crop(1.0), torch.device("cpu")))
    loader.close()
    assert [batch.rows.tolist() for batch in batches] == [[5, 3, 2], [1, 0]]
    assert list(batches[0].broken) == [4]
    assert images.where(4).endswith("blue/001.png")
