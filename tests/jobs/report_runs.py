"""Run folders with made-up numbers, for tests of what a report says."""

import json
from pathlib import Path

import numpy as np

from jobs.reporting.gallery import HardViews


def protocol(kind: str, **changes: object) -> dict:
    """A protocol as evaluations record it."""
    data = {
        role: {"name": f"cats/{role}", "images": 8, "fingerprint": f"{role}0123456789"} for role in ("train", "test")
    }
    own = {"k": [10, 20], "temperature": 0.07} if kind == "knn" else {"epochs": 100, "batch": 256}
    return {**data, "size": 32, "crop": 1.0, "pool": "default", "labels": 1.0, "shots": 0, "seeds": 1, **own, **changes}


def make_run(path: Path, *, lines: int = 40, seed: int = 0) -> Path:
    """A run folder with everything the report reads but images."""
    rng = np.random.default_rng(seed)
    (path / "analysis").mkdir(parents=True)
    (path / "evaluation").mkdir()
    config = {
        "objective": {"name": "synby"},
        "backbone": {"name": "vit_tiny_patch16_224", "image_size": 32},
        "selection": {"views": 4, "rule": "hardest", "encoder": "online"},
        "optimizer": {"lr": 0.001},
        "batch": 64,
        "seed": seed,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "state.json").write_text(json.dumps({"state": "finished"}))
    entries = []
    for i in range(lines):
        entry = {"step": 10 * i, "time": 1.76e9 + i, "train/loss": 8 - i / lines + float(rng.normal()) / 10}
        entry |= {"train/images_per_second": 100.0 + i, "time/data": 0.2, "time/forward": 0.7, "time/step": 1.0}
        if i % 10 == 0:
            entry["knn/top1"] = 0.4 + i / 200
        entries.append(entry)
    (path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    analysis = {
        "lowest_iou_share": 0.41,
        "chance": 1 / 6,
        "iou_histograms": {"edges": [0, 0.5, 1], "chosen": [3, 1], "all": [2, 2], "random": [2, 2]},
        "importance": [{"feature": "iou", "share": 0.152, "low": 0.14, "high": 0.16}],
        "over_training": [{"step": s, "lowest_iou_share": 0.4, "mean_iou": 0.3} for s in (0, 100)],
        "by_source": {"real": {"mean_loss": 7.0}, "synthetic": {"mean_loss": 7.2}},
    }
    (path / "analysis" / "analysis.json").write_text(json.dumps(analysis))
    for kind, top1 in (("knn", 0.62), ("linear", 0.7)):
        scores = {
            "kind": kind,
            "model": {"name": path.name, "source": "run", "step": 390, "which": "target"},
            "scores": {"top1": top1, "top5": 0.9, "top1_deviation": 0.01},
            "protocol": protocol(kind),
            "identity": f"{kind}0123456789"[:12],
            "train": protocol(kind)["train"],
            "test": protocol(kind)["test"],
            "confusion": [[3, 1, 0], [0, 4, 0], [0, 0, 0]],
            "classes": ["cat", "dog", "emu without images"],
            "per_class": [{"class": "cat", "images": 4, "top1": 0.75}, {"class": "dog", "images": 4, "top1": 1.0}],
        }
        (path / "evaluation" / f"{kind}.json").write_text(json.dumps(scores))
    (path / "quarantine.jsonl").write_text(
        json.dumps({"shard": "shard-000001.tar", "key": "0007", "reason": "crc"}) + "\n"
    )
    return path


def hard_views(size: int = 48, views: int = 4) -> HardViews:
    rng = np.random.default_rng(1)
    pairs = np.array([(a, b) for a in range(views) for b in range(a + 1, views)])
    return HardViews(
        title="cat 7",
        note="real, step 12",
        original=rng.integers(0, 255, (size, size, 3), dtype=np.uint8),
        boxes_V4=np.array([[v, v, size // 2, size // 3] for v in range(views)]),
        views=[rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(views)],
        pairs_P2=pairs,
        losses_P=np.arange(len(pairs), dtype=np.float32),
        chosen=len(pairs) - 1,
        overlaps_P=np.linspace(0, 1, len(pairs)),
    )
