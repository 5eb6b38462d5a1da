"""The evaluations as jobs: flags in, scores out, kept as JSON beside the run.

Suffixes: n training images, q test images, D width.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from jobs.evaluation import linear
from jobs.evaluation.backbones import ModelConfig, load_frozen
from jobs.evaluation.features import Features, default_crop, features_of
from jobs.evaluation.finetune import FinetuneConfig, finetune
from jobs.evaluation.frozen import Frozen
from jobs.evaluation.images import ImageSet, align_labels, label_table, open_images, warn_unscored
from jobs.evaluation.knn import KS, TEMPERATURE, knn_scores
from jobs.evaluation.loading import Loader, check_crops, crop_and_flip
from jobs.evaluation.metrics import over_seeds, summarize
from jobs.evaluation.retrieval import mean_average_precision
from jobs.evaluation.splits import subset
from jobs.run.folder import open_run, write_json
from jobs.run.terminal import check_least, progress
from jobs.run.world import World, open_world
from models.probes import rankme
from shards.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every evaluation needs."""

    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    train: str
    """Labelled images to learn from: a folder of shards, an fsspec address, or an ImageFolder."""
    test: str
    """Labelled images to score on, likewise."""
    forward_batch: int = 256
    """Images per forward pass where only features are computed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the backbone runs; auto = cuda where there is one."""
    cache: bool = True
    """Keep features in the run's evaluation/features, named by a hash of weights, images and transform."""
    out: Path | None = None
    """File for the scores (JSON); default: a name made of the measure, in the run's evaluation folder."""


@dataclass(frozen=True, kw_only=True)
class FewLabelsConfig(CommonConfig):
    """Evaluations that can learn from few labels."""

    labels: float = 1.0
    """Share of each class's training images that is used (0.01 and 0.1 are the usual ones)."""
    shots: int = 0
    """Training images per class instead of a share; 0 = by share."""
    seeds: int = 1
    """Repeats with other seeds (other subset, other order); scores are their mean and deviation."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FewLabelsConfig):
    """Weighted k-nearest-neighbour classification."""

    k: tuple[int, ...] = KS
    """Numbers of neighbours."""
    temperature: float = TEMPERATURE
    """A neighbour's vote weighs exp(cosine / temperature)."""


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(FewLabelsConfig):
    """A linear layer on frozen features, a whole sweep of learning rates trained at once."""

    sgd: Annotated[linear.LinearConfig, tyro.conf.arg(name="")] = field(default_factory=linear.LinearConfig)
    augment: bool = True
    """Random crops and flips in every epoch, as in the papers; off: features are computed once, far faster."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crops (share of the image)."""
    validation: float = 0.0
    """Share of the training images held out to pick the learning rate; 0 = pick on the test images, as papers do."""


@dataclass(frozen=True, kw_only=True)
class FinetuneProbeConfig(FewLabelsConfig):
    """Training the whole backbone with labels."""

    tuning: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = field(default_factory=FinetuneConfig)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(CommonConfig):
    """Mean average precision of retrieving training images by test images, and RankMe of the training features."""


@dataclass(frozen=True)
class Scene:
    """What an evaluation works with; labels_q are in the numbering of the training classes."""

    frozen: Frozen
    facts: dict[str, Any]
    train: ImageSet
    test: ImageSet
    labels_q: np.ndarray
    world: World
    cache: Path | None

    def features(self, images: ImageSet, batch: int) -> Features:
        role = "training images" if images is self.train else "test images"
        return features_of(self.frozen, images, role, self.world.device, batch, self.world, self.cache)


# What is kept of an evaluation; `scored` is the number of test images behind its scores.
Measure = Callable[[Scene], dict[str, Any]]


def _evaluate(kind: str, config: CommonConfig, measure: Measure, labelled: bool = True) -> dict[str, Any]:
    """Opens everything, measures, adds what is common to all scores, writes them on the leading rank."""
    _check(config)
    began = time.monotonic()
    with ExitStack() as stack:
        train = stack.enter_context(closing(open_images(config.train)))
        test = stack.enter_context(closing(open_images(config.test)))
        labels_q = align_labels(train, test) if labelled else test.labels
        frozen, facts = load_frozen(config.model)
        world = stack.enter_context(open_world(config.device))
        run = config.model.run
        cache = open_run(run).evaluation / "features" if config.cache and run is not None else None
        if world.leads:
            warn_unscored(train, test)
        measured = measure(Scene(frozen, facts, train, test, labels_q, world, cache))
        result = {
            "kind": kind,
            "model": facts,
            "protocol": (protocol := protocol_of(config, frozen, train, test)),
            "identity": identity_of(kind, facts, protocol),
            "train": {"name": train.name, "images": len(train.labels)},
            "test": {"name": test.name, "images": measured.pop("scored"), "listed": len(test.labels)},
            **measured,
            "pool": config.model.pool,
            "seconds": 0.0,
        }
        result["seconds"] = round(time.monotonic() - began, 2)
        if not world.leads:
            return {**result, "leads": False}
    if config.out is not None:
        folder = config.out.parent
    elif run is not None:
        folder = open_run(run).evaluation
    else:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        place = config.out or scores_file(folder, name_of(kind, config, facts), result["identity"])
        write_json(place, result)
    return {**result, "file": str(place)}


def _check(config: CommonConfig) -> None:
    check_least(config, forward_batch=1)
    if config.out is not None and config.out.is_dir():
        raise InputError(f"out: {config.out} is a folder; give a file for the scores")
    check_least(config.model, size=0)
    if isinstance(config, FewLabelsConfig):
        check_least(config, seeds=1, shots=0)
        if not 0 < config.labels <= 1:
            raise InputError(f"labels: {config.labels} is no share of the labels; give above 0 and at most 1")
    if isinstance(config, KnnConfig) and (not config.k or min(config.k) < 1):
        raise InputError(f"k: {config.k} must name numbers of neighbours above 0")
    if isinstance(config, KnnConfig) and config.temperature <= 0:
        raise InputError(f"temperature: {config.temperature} must be above 0")
    if isinstance(config, LinearProbeConfig):
        check_crops(config.crop_scale)
        if not 0 <= config.validation < 1:
            raise InputError(
                f"validation: {config.validation} must be at least 0 and below 1: the rest trains the probe"
            )


# Flags that change no score: where things lie, and how fast it goes.
NO_PROTOCOL = {"model", "train", "test", "forward_batch", "device", "cache", "out"}


def protocol_of(config: CommonConfig, frozen: Frozen, train: ImageSet, test: ImageSet) -> dict[str, Any]:
    """All that decides a score besides the weights, as JSON values: scores of equal protocols can be compared."""
    settings = {name: value for name, value in asdict(config).items() if name not in NO_PROTOCOL}
    settings |= settings.pop("sgd", {}) | settings.pop("tuning", {})
    if settings.get("augment") is False:
        del settings["crop_scale"]
    data = {
        role: {"name": images.name, "images": len(images.labels), "fingerprint": images.fingerprint}
        for role, images in (("train", train), ("test", test))
    }
    crop = {"size": frozen.size, "crop": default_crop(frozen.size), "pool": frozen.pool}
    return json.loads(json.dumps({**data, **crop, "mean": frozen.mean, "std": frozen.std, **settings}))


def identity_of(kind: str, facts: dict[str, Any], protocol: dict[str, Any]) -> str:
    """What an evaluation is, in 12 digits: measure, weights and protocol."""
    weights = {name: value for name, value in facts.items() if facts["source"] != "run" or name != "name"}
    data = {role: protocol[role]["fingerprint"] for role in ("train", "test")}
    text = json.dumps([kind, weights, {**protocol, **data}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def name_of(kind: str, config: CommonConfig, facts: dict[str, Any]) -> str:
    """What a reader looks for in the name of a file of scores."""
    words = [kind, facts["source"] if facts["source"] != "run" else f"step-{facts['step']}", Path(config.test).name]
    if config.model.pool != "default":
        words.append(config.model.pool)
    if config.model.which != "kept" and "which" in facts:
        words.append(facts["which"])
    if isinstance(config, FewLabelsConfig) and config.shots:
        words.append(f"{config.shots}-shot")
    elif isinstance(config, FewLabelsConfig) and config.labels < 1:
        words.append(f"{100 * config.labels:g}-percent")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))


def scores_file(folder: Path, name: str, identity: str) -> Path:
    """Where the scores go: they replace older ones of the same evaluation alone. Where another evaluation has the
    plain name, the identity is part of it."""
    for path in folder.glob("*.json"):
        if kept_identity(path) == identity:
            return path
    plain = folder / f"{name}.json"
    return folder / f"{name}-{identity}.json" if plain.exists() else plain


def kept_identity(path: Path) -> str | None:
    """Identity of the evaluation that a file holds; None where it holds none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content.get("identity") if isinstance(content, dict) else None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Other processes that want the same wait meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _repeat(
    config: FewLabelsConfig, labels_n: np.ndarray, once: Callable[[np.ndarray, int], dict[str, Any]]
) -> dict[str, Any]:
    """`once(rows, seed)` for every seed: the first seed's details, all seeds' mean scores."""
    results = [
        once(subset(labels_n, share=config.labels, shots=config.shots, seed=seed), seed) for seed in range(config.seeds)
    ]
    merged = {**results[0], "scores": over_seeds([r["scores"] for r in results]), "seeds": config.seeds}
    return {**merged, "labels": config.labels, "shots": config.shots, "by_seed": [r["scores"] for r in results]}


def evaluate_knn(config: KnnConfig) -> dict[str, Any]:
    """Weighted kNN; the headline is k = 20."""

    def measure(scene: Scene) -> dict[str, Any]:
        train_nD, train_labels_n, _ = scene.features(scene.train, config.forward_batch)
        test_qD, test_labels_q, _ = scene.features(scene.test, config.forward_batch)
        table = torch.from_numpy(label_table(scene.train, scene.test))

        def once(rows: np.ndarray, seed: int) -> dict[str, Any]:
            picked = torch.from_numpy(rows)
            measured = knn_scores(
                train_nD[picked], train_labels_n[picked], test_qD, table[test_labels_q],
                scene.train.classes, config.k, config.temperature,
            )  # fmt: skip
            scores = {name: measured.pop(name) for name in ("top1", "top5") if name in measured}
            return {"scores": scores, **measured}

        return _repeat(config, train_labels_n.numpy(), once)

    return _evaluate("knn", config, measure)


def evaluate_linear(config: LinearProbeConfig) -> dict[str, Any]:
    """Linear probes; the headline is the learning rate that does best, on held-out images if there are any."""

    def measure(scene: Scene) -> dict[str, Any]:
        test_qD, own_q, _ = scene.features(scene.test, config.forward_batch)
        labels_q = torch.from_numpy(label_table(scene.train, scene.test))[own_q]
        keep = labels_q >= 0
        train = scene.features(scene.train, config.forward_batch)

        def once(rows: np.ndarray, seed: int) -> dict[str, Any]:
            rows, held = _hold_out(rows, train.labels_n.numpy(), config.validation, seed)
            return _probe(config, scene, train, rows, held, test_qD[keep], labels_q[keep], seed)

        return _repeat(config, train.labels_n.numpy(), once)

    return _evaluate("linear", config, measure)


def _hold_out(rows: np.ndarray, labels_n: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `labels_n` to train on and, stratified, rows to pick the learning rate on (none for share 0)."""
    if share == 0:
        return rows, rows[:0]
    held = rows[subset(labels_n[rows], share=share, seed=seed)]
    if len(held) == len(rows):  # of each class at least one is held out
        raise InputError(f"validation: {share} leaves no image to train on; give a smaller share, or more images")
    return np.setdiff1d(rows, held), held


def _probe(
    config: LinearProbeConfig, scene: Scene, train: Features, rows: np.ndarray, held: np.ndarray,
    test_qD: Tensor, labels_q: Tensor, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """`rows` and `held` count the rows of `train`, which are not those of the images where some cannot be read."""
    device, classes = scene.world.device, scene.train.classes
    train_nD, labels_n, images_n = train
    picked = torch.from_numpy(rows)
    features, labels = train_nD[picked].to(device), labels_n[picked].to(device)
    bank = linear.LinearBank(config.sgd, *linear.statistics(features), len(classes))
    batches, steps = linear.cached_batches(features, labels, config.sgd.batch, seed, scene.world)
    with ExitStack() as stack:
        if config.augment:
            batches = _augmented(stack, config, scene, images_n[picked].numpy(), seed)
        bar = stack.enter_context(progress("linear probe", config.sgd.epochs, "epochs")) if scene.world.leads else None
        linear.train(bank, config.sgd.epochs, steps, batches, scene.world, bar.advance if bar else None)
    guesses_RqT = bank.predict(test_qD.to(device)).cpu()
    if len(held):
        judge = torch.from_numpy(held)
        top1_R = (bank.predict(train_nD[judge].to(device), 1)[..., 0].cpu() == labels_n[judge]).float().mean(1)
    else:
        top1_R = (guesses_RqT[..., 0] == labels_q).float().mean(1)
    best = int(top1_R.argmax())
    by_rate = [
        {"rate": rate, "top1": float((guesses[:, 0] == labels_q).float().mean())}
        for rate, guesses in zip(config.sgd.rates, guesses_RqT, strict=True)
    ]
    picked_on = "held-out training images" if len(held) else "test images"
    details = {"rate": config.sgd.rates[best], "picked_on": picked_on, "by_rate": by_rate, "epochs": config.sgd.epochs}
    return {**summarize(guesses_RqT[best].numpy(), labels_q.numpy(), classes), **details, "augment": config.augment}


def _augmented(stack: ExitStack, config: LinearProbeConfig, scene: Scene, rows: np.ndarray, seed: int) -> linear.Epoch:
    """Epochs of features of random crops of the images `rows`; one forward pass serves all learning rates."""
    world, frozen = scene.world, scene.frozen
    per_rank = max(config.sgd.batch // world.size, 1)
    loader = Loader(scene.train, frozen.size, per_rank, frozen.mean, frozen.std)
    stack.callback(loader.close)
    labels_n = torch.from_numpy(scene.train.labels)
    frozen.model.to(world.device).eval()

    @torch.inference_mode()
    def epoch_batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        order = order[: len(order) // world.size * world.size][world.rank :: world.size]
        transform = crop_and_flip(seed, epoch, frozen.size, config.crop_scale)
        for batch in loader.batches(order, transform, world.device):
            yield frozen.features(batch.crops_B3SS), labels_n[batch.rows].to(world.device)

    return epoch_batches


def evaluate_finetune(config: FinetuneProbeConfig) -> dict[str, Any]:
    """Fine-tuning with layer decay."""
    if config.model.pixels:
        raise InputError("pixels: there is no backbone to fine-tune; leave it out")

    def measure(scene: Scene) -> dict[str, Any]:
        def once(rows: np.ndarray, seed: int) -> dict[str, Any]:
            with ExitStack() as stack:
                lead = scene.world.leads
                bar = stack.enter_context(progress("fine-tuning", config.tuning.epochs, "epochs")) if lead else None
                guesses_qT, kept = finetune(
                    scene.frozen, scene.train, scene.train.labels, rows, scene.test,
                    np.flatnonzero(scene.labels_q >= 0), len(scene.train.classes), config.tuning, seed, scene.world,
                    bar.advance if bar else None,
                )  # fmt: skip
            return summarize(guesses_qT, scene.labels_q[kept], scene.train.classes)

        return {**_repeat(config, scene.train.labels, once), "config": asdict(config.tuning)}

    return _evaluate("finetune", config, measure)


def evaluate_retrieval(config: RetrievalConfig) -> dict[str, Any]:
    """RankMe of the training features, which need no label, and mean average precision where there are labels."""

    def measure(scene: Scene) -> dict[str, Any]:
        train_nD, train_labels_n, _ = scene.features(scene.train, config.forward_batch)
        scores = {"rankme": float(rankme(train_nD))}
        table = torch.from_numpy(label_table(scene.train, scene.test))
        if (table < 0).all():
            return {"scores": scores, "scored": 0, "note": "no labels in common, so no mean average precision"}
        test_qD, own_q, _ = scene.features(scene.test, config.forward_batch)
        labels_q = table[own_q]
        known = labels_q >= 0
        gallery = train_labels_n >= 0
        scores["map"] = mean_average_precision(
            test_qD[known], labels_q[known], train_nD[gallery], train_labels_n[gallery]
        )
        return {"scores": scores, "scored": int(known.sum())}

    return _evaluate("retrieval", config, measure, labelled=False)
