"""Weighted k-nearest-neighbour classification of frozen features (Wu et al. 2018; DINO).

Suffixes: n training images, q test images, D width.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jobs.evaluation.metrics import summarize, top_accuracy
from models.probes import weighted_knn
from shards.errors import InputError

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# DINO found 20 to work best over backbones; taking the best k of each model would read the test labels.
HEADLINE = 20


def knn_scores(
    train_nD: Tensor,
    train_labels_n: Tensor,
    test_qD: Tensor,
    test_labels_q: Tensor,
    classes: Sequence[str],
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """`top1` (from 6 classes on, `top5` too) and the rest of `summarize` for the headline k (20, or else the first);
    the accuracies of every k in `by_k`.

    Rows with a label below 0 take no part; a k above the number of training images is taken as all of them.

    Raises:
        InputError: no labelled row is left on either side.
    """
    train_nD, train_labels_n = train_nD[train_labels_n >= 0], train_labels_n[train_labels_n >= 0]
    test_qD, test_labels_q = test_qD[test_labels_q >= 0], test_labels_q[test_labels_q >= 0]
    if not len(train_labels_n) or not len(test_labels_q):
        raise InputError("knn: no labelled image is left to learn from or to score on; give labelled images")
    labels_q = test_labels_q.cpu().numpy()
    headline = HEADLINE if HEADLINE in ks else ks[0]
    by_k, summary = [], {}
    votes = weighted_knn(train_nD, train_labels_n, test_qD, len(classes), tuple(ks), temperature)
    for k in ks:
        best = votes[k].topk(min(5, len(classes)), dim=1)
        guesses_qT = best.indices.masked_fill(best.values < 0, -1).cpu().numpy()  # without a vote there is no guess
        row = {"k": k, "top1": top_accuracy(guesses_qT, labels_q, 1)}
        if len(classes) > 5:
            row["top5"] = top_accuracy(guesses_qT, labels_q, 5)
        by_k.append(row)
        if k == headline:
            summary = summarize(guesses_qT, labels_q, classes)
    details = {name: summary[name] for name in summary if name != "scores"}
    return {**summary["scores"], "by_k": by_k, "k": headline, "temperature": temperature, **details}
