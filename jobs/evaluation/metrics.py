"""Accuracy, confusion and their spread over seeds: from predictions to the numbers that are stored.

Suffixes: n images, C classes, T best guesses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def top_accuracy(guesses_nT: np.ndarray, labels_n: np.ndarray, most: int) -> float:
    """Share of labels among the first `most` guesses (best first)."""
    return float((guesses_nT[:, :most] == labels_n[:, None]).any(axis=1).mean())


def confusion_matrix(predicted_n: np.ndarray, labels_n: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: row = true class, column = predicted class."""
    return np.bincount(labels_n * classes + predicted_n, minlength=classes * classes).reshape(classes, classes)


def summarize(guesses_nT: np.ndarray, labels_n: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Top-1 and top-5, number of images, confusion matrix, names of its rows and per-class top-1 as plain JSON values;
    top-5 where there are more than 5 classes, top-1 of the classes that have images."""
    matrix = confusion_matrix(guesses_nT[:, 0], labels_n, len(classes))
    scores = {"top1": top_accuracy(guesses_nT, labels_n, 1)}
    if len(classes) > 5 and guesses_nT.shape[1] >= 5:
        scores["top5"] = top_accuracy(guesses_nT, labels_n, 5)
    per_class = [
        {"class": name, "images": int(row.sum()), "top1": float(row[i] / row.sum())}
        for i, (name, row) in enumerate(zip(classes, matrix, strict=True))
        if row.sum()
    ]
    return {
        "scores": scores,
        "scored": len(labels_n),
        "confusion": matrix.tolist(),
        "classes": list(classes),
        "per_class": per_class,
    }


def over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each score over seeds and, from two seeds on, its sample standard deviation as `<score>_deviation`."""
    merged: dict[str, float] = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        merged[name] = float(values.mean())
        if len(runs) > 1:
            merged[f"{name}_deviation"] = float(values.std(ddof=1))
    return merged
