import csv
import json
from pathlib import Path

import numpy as np
import pytest
from log_rows import append, batch_at, losses_at, params_at, write_log

from jobs.analyse import analyse, main
from jobs.analysis.choices import GROUPS, HISTOGRAMS, MEANS, Choices
from jobs.analysis.classifier import predict_choice
from jobs.analysis.importance import correlation_ratios, image_weights, importance
from jobs.analysis.pairs import METRICS, pair_metrics, pair_zoom
from jobs.analysis.sample import PairData, RowSample, pair_data
from jobs.log.writer import AugmentationLog, Rows, batch_rows, open_log
from pipelines.params import pairs
from shards.errors import InputError


def rows_of(count=400, views=4, loss=None, images=100, seed=0) -> Rows:
    at = np.arange(count)
    params = params_at(at, views, seed)
    losses = losses_at(at, views, params) if loss is None else loss(params).astype(np.float32)
    return Rows(
        position_B=at,
        step_B=at // 40,
        sample_B=at % images,
        source_B=(at % 3 == 0).astype(np.int16),
        epoch_B=np.zeros(count, np.int32),
        label_B=np.where(at % 5 == 0, -1, at % 5).astype(np.int32),
        image_height_B=np.full(count, 100, np.int32),
        image_width_B=np.full(count, 120, np.int32),
        params=params,
        loss_BP=losses,
        choice_B=losses.argmax(1).astype(np.int32),
        at_random_B=np.zeros(count, bool),
        chosen_BN=np.zeros((count, views), bool),
    )


def naive_means(rows: Rows) -> dict[str, float]:
    """Every mean that does not depend on random pairs, row by row and pair by pair."""
    found: dict[str, list[float]] = {name: [] for name in MEANS if "random" not in name}
    p = rows.params
    for b in range(len(rows)):
        iou, zoom, distance = [], [], []
        for i, j in pairs(4):
            top, left = max(p.top[b, i], p.top[b, j]), max(p.left[b, i], p.left[b, j])
            bottom = min(p.top[b, i] + p.height[b, i], p.top[b, j] + p.height[b, j])
            right = min(p.left[b, i] + p.width[b, i], p.left[b, j] + p.width[b, j])
            both = max(bottom - top, 0) * max(right - left, 0)
            area = [int(p.height[b, v]) * int(p.width[b, v]) for v in (i, j)]
            iou.append(both / (sum(area) - both))
            zoom.append(abs(np.log2(area[0] / area[1])))
            down = p.top[b, i] + p.height[b, i] / 2 - p.top[b, j] - p.height[b, j] / 2
            across = p.left[b, i] + p.width[b, i] / 2 - p.left[b, j] - p.width[b, j] / 2
            distance.append(np.hypot(down, across) / np.hypot(100, 120))
        c = rows.choice_B[b]
        lowest = np.isclose(iou, min(iou))
        found["lowest_iou_share"].append(lowest[c])
        found["chance"].append(lowest.mean())
        for name, values in (("iou", iou), ("zoom", zoom), ("distance", distance)):
            found[f"mean_{name}"].append(values[c])
            found[f"mean_{name}_all"].append(np.mean(values))
        found["mean_loss"].append(rows.loss_BP[b].mean())
        found["mean_loss_chosen"].append(rows.loss_BP[b, c])
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def test_choices_equal_a_naive_loop():
    rows = rows_of()
    choices = Choices((0, 9), ["real", "synthetic"], windows=5)
    for start in range(0, 400, 150):
        choices.add(rows[start : start + 150])
    total, naive = choices.total(), naive_means(rows)
    assert {name: total[name] for name in naive} == pytest.approx(naive, rel=1e-5)
    series = choices.over_training()
    assert [(row["first_step"], row["last_step"]) for row in series] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    second = naive_means(rows[80:160])
    assert {name: series[1][name] for name in second} == pytest.approx(second, rel=1e-5)
    real = naive_means(rows[np.flatnonzero(rows.source_B == 0)])
    assert {name: choices.by_source()["real"][name] for name in real} == pytest.approx(real, rel=1e-5)
    classes = choices.by_class()
    assert [row["class"] for row in classes] == [1, 2, 3, 4]
    third = naive_means(rows[np.flatnonzero(rows.label_B == 3)])
    assert {name: classes[2][name] for name in third} == pytest.approx(third, rel=1e-5)


def test_histograms_equal_numpys():
    rows = rows_of()
    choices = Choices((0, 9), ["real", "synthetic"])
    choices.add(rows)
    metrics = pair_metrics(rows.params, rows.sizes_B2) | {"zoom": pair_zoom(rows.params)}
    for name, edges in HISTOGRAMS.items():
        values = metrics[name]
        # Values on an edge may fall to either side of it; none here but 0.
        expected = np.histogram(values, [*edges[:-1], np.inf])[0]
        np.testing.assert_array_equal(choices.histograms[name]["all"], expected)
        chosen = values[np.arange(400), rows.choice_B]
        np.testing.assert_array_equal(
            choices.histograms[name]["chosen"], np.histogram(chosen, [*edges[:-1], np.inf])[0]
        )
        assert choices.histograms[name]["random"].sum() == 400
    assert choices.grids["all"].sum() == 2_400


def test_share_is_one_for_lowest_iou_and_chance_for_random_choices():
    rows = rows_of(4_000, loss=lambda params: -pair_metrics(params, np.ones((4_000, 2), int))["iou"])
    lowest = Choices((0, 99), ["real", "synthetic"])
    lowest.add(rows)
    assert lowest.total()["lowest_iou_share"] == 1
    rng = np.random.default_rng(0)
    rows = rows_of(4_000, loss=lambda _: rng.random((4_000, 6)))
    random = Choices((0, 99), ["real", "synthetic"])
    random.add(rows)
    total = random.total()
    assert total["low"]["lowest_iou_share"] < total["chance"] < total["high"]["lowest_iou_share"]
    assert total["chance"] >= 1 / 6


def test_error_bars_allow_for_images_that_recur():
    """Each image's loss is its own: 100 images seen 40 times say as much as 100 rows, not 4,000."""
    own = np.random.default_rng(0).normal(size=100)
    rows = rows_of(4_000, loss=lambda _: np.repeat(own[np.arange(4_000) % 100, None], 6, 1))
    choices = Choices((0, 99), ["real", "synthetic"])
    choices.add(rows)
    total = choices.total()
    error = (total["high"]["mean_loss"] - total["mean_loss"]) / 1.96
    assert error == pytest.approx(own.std() / 10, rel=3 / np.sqrt(2 * GROUPS))


def test_sample_is_uniform_and_bounded():
    count = np.zeros(400)
    for seed in range(300):
        sample = RowSample(20, seed)
        for start in range(0, 400, 30):
            sample.add(rows_slices[start // 30])
        found = sample.rows()
        assert found is not None and len(found) == 20
        assert (np.diff(found.position_B) > 0).all()
        count[found.position_B] += 1
    # 300 samples of 20 from 400: each row 15 times on average, with deviation 3.8.
    assert count.std() == pytest.approx(np.sqrt(15 * 0.95), rel=0.15) and count.max() < 15 + 5 * 3.8


rows_slices = [rows_of()[start : start + 30] for start in range(0, 400, 30)]


def planted(images=400, repeats=50, seed=0) -> PairData:
    """loss = 2·x0 + x1 + image's own + noise, x uniform: shares 4/12, 1/12, … of a variance of 5/12 + 1/4 + 1/4."""
    rng = np.random.default_rng(seed)
    x = rng.random((images * repeats, len(METRICS))).astype(np.float32)
    image = np.repeat(np.arange(images), repeats)
    loss = 2 * x[:, 0] + x[:, 1] + rng.normal(0, 0.5, images)[image] + rng.normal(0, 0.5, len(x))
    return PairData(x, loss.astype(np.float64), image, np.arange(len(x)))


def test_importance_of_a_noisy_linear_loss():
    data = planted()
    found = importance(data, 4, 2)
    expected = np.array([4 / 12, 1 / 12, 0, 0, 0, 0, 0]) / data.loss_R.var()
    assert [share.share for share in found.loss[:7]] == pytest.approx(expected, abs=0.03)
    assert [share.share for share in found.correlation] == pytest.approx(expected, abs=0.02)
    assert found.r2_out_of_bag == pytest.approx(expected.sum(), abs=0.06)
    # Fully grown trees vary as much as the loss does.
    assert [share.share for share in found.tree[:7]] == pytest.approx(expected, abs=0.06)
    assert all(pair["share"] < 0.01 for pair in found.interactions)
    for shares in (found.loss, found.tree, found.correlation):
        assert all(share.low <= share.share <= share.high for share in shares)
    curve = found.curves["iou"]
    np.testing.assert_allclose(np.polyfit(curve["metric"], curve["loss"], 1)[0], 2, atol=0.2)


def test_resampling_takes_images_not_pairs():
    data = planted(images=30, repeats=10)
    weights = image_weights(data, np.random.default_rng(0)).reshape(30, 10)
    assert (weights == weights[:, :1]).all() and weights[:, 0].sum() == 30 and (weights == 0).any()


def test_correlation_ratio_counts_what_is_correlated_and_nothing_else():
    data = planted()
    metrics = data.metrics_RF.copy()
    metrics[:, 2] = metrics[:, 0] + 0.1 * metrics[:, 3]  # no effect of its own
    shares = correlation_ratios(PairData(metrics, data.loss_R, data.image_R, data.step_R), np.random.default_rng(0))
    assert shares[2].share > 0.9 * shares[0].share
    assert abs(shares[4].share) < 0.004


def test_classifier_learns_a_rule_and_nothing_from_noise():
    found = predict_choice(rows_of(2_000, loss=lambda p: -np.abs(p.brightness[:, pairs(4)].sum(2)), images=500))
    assert found is not None and found.top1 > 0.6 and found.test_images == 125 and found.train_images == 375
    rng = np.random.default_rng(0)
    noise = predict_choice(rows_of(2_000, loss=lambda _: rng.random((2_000, 6)), images=500), iterations=20)
    assert noise is not None and noise.low <= noise.chance <= noise.high and noise.chance == 1 / 6
    assert predict_choice(rows_of(100, images=19)) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    write_log(folder / "log.zarr", steps=20, batch=50)
    return folder


@pytest.fixture(scope="module")
def analysis(run):
    return analyse(run, pairs=6_000)


def read_json(path: Path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_analysis_is_whole(run, analysis):
    assert analysis["notes"] == []
    assert read_json(run / "analysis" / "analysis.json") == json.loads(json.dumps(analysis))
    assert analysis["lowest_iou_share"] > 1.5 * analysis["chance"] > 1.5 / 6
    assert sum(analysis["iou_histograms"]["chosen"]) == 1_000 and sum(analysis["iou_histograms"]["all"]) == 6_000
    assert [share["feature"] for share in analysis["importance"]] == [*METRICS, "all jointly"]
    assert analysis["importance"][0]["share"] == max(share["share"] for share in analysis["importance"])
    assert len(analysis["importance_details"]["traps"]) == 2
    assert set(analysis["by_source"]) == {"real", "synthetic"} and len(analysis["over_training"]) == 20
    assert analysis["classifier"]["top1"] > analysis["classifier"]["chance"]
    folder = run / "analysis"
    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == {path.stem for path in folder.glob("*.svg")} and len(pictures) == 8
    assert {path.stem for path in folder.glob("*.csv")} == {
        "over_training", "by_source", "by_class", "distributions", "zoom_distance", "classifier", "importance",
        "interactions", "loss_curves",
    }  # fmt: skip
    with (folder / "by_source.csv").open() as file:
        table = {row["source"]: row for row in csv.DictReader(file)}
    assert float(table["real"]["mean_loss_low"]) == pytest.approx(analysis["by_source"]["real"]["low"]["mean_loss"])


def test_analysis_is_reproducible_and_takes_steps(run, tmp_path):
    (tmp_path / "log.zarr").symlink_to(run / "log.zarr")
    part = analyse(tmp_path, pairs=1_000, steps="5:15", pictures=False)
    assert part["rows"] == 500 and part["over_training"][0]["step"] == 5 and part["over_training"][-1]["step"] == 14
    assert analyse(tmp_path, pairs=1_000, steps="5:15", pictures=False) == part


def test_one_step_without_labels_and_steps_without_losses(tmp_path):
    write_log(tmp_path / "log.zarr", steps=1, batch=30, labelled=False)
    found = analyse(tmp_path)
    assert [note.split(":")[0] for note in found["notes"]] == ["steps", "labels", "importance"]
    assert len(found["over_training"]) == 1 and found["lowest_iou_share"] is not None
    read_json(tmp_path / "analysis" / "analysis.json")
    assert not (tmp_path / "analysis" / "by_class.csv").exists()

    write_log(tmp_path / "every" / "log.zarr", steps=6, batch=30, every=3)
    found = analyse(tmp_path / "every", pictures=False)
    assert found["rows"] == 60 and "120 rows that were not scored" in found["notes"][0]


def test_rows_at_random_are_left_out_of_choices_but_explain_losses(tmp_path):
    write_log(tmp_path / "log.zarr", steps=10, batch=50, at_random=5)
    rows = Rows.concatenate(list(open_log(tmp_path / "log.zarr").chunks()))
    assert rows.at_random_B.sum() == 100
    found = analyse(tmp_path, pictures=False)
    assert found["rows"] == 400 and "100 rows that trained on a random pair" in found["notes"][0]
    by_rule = naive_means(rows[np.flatnonzero(~rows.at_random_B)])
    assert {name: found["choices"][name] for name in by_rule} == pytest.approx(by_rule, rel=1e-5)
    assert found["importance_details"]["rows"] == 500 * 6
    assert found["classifier"]["test_rows"] < 200

    write_log(tmp_path / "all" / "log.zarr", steps=4, batch=50, at_random=1)
    only = analyse(tmp_path / "all", pictures=False)
    assert only["rows"] == 200 and "importance" in only and "classifier" not in only


def test_no_losses_or_no_choices(tmp_path):
    at = np.arange(50)
    for name, choice in (("random", at % 6), ("nothing", None)):
        log = AugmentationLog(tmp_path / name / "log.zarr", 0, 4)
        for step in range(2):
            made = batch_at(step * 50, params_at(at + step * 50, 4), at, at * 0, at * 0, at * 0)
            log.append(batch_rows(made, step, 4, choice_B=choice))
        log.close()
    found = analyse(tmp_path / "random", pictures=False)
    assert found["choices"]["mean_loss"] is None and found["choices"]["mean_iou"] > 0 and found["rows"] == 100
    assert [note.split(":")[0] for note in found["notes"]] == ["losses"]
    read_json(tmp_path / "random" / "analysis" / "analysis.json")
    found = analyse(tmp_path / "nothing")
    assert [note.split(":")[0] for note in found["notes"]] == ["losses", "choice"]
    assert found["lowest_iou_share"] is None


def test_a_log_with_a_loss_that_is_not_a_number(tmp_path):
    log = AugmentationLog(tmp_path / "log.zarr", 0, 4)
    for step in range(3):
        append(log, step, step * 40, 40, 4, sources=1)
    at = np.arange(40)
    losses = np.full((40, 6), np.inf, np.float32)
    log.append(batch_rows(batch_at(120, params_at(at, 4), at, at * 0, at * 0, at), 3, 4, losses, at % 6))
    log.close()
    assert analyse(tmp_path, pictures=False)["rows"] == 120


def test_command_compares_runs_and_names_those_without_a_log(run, tmp_path, capsys, monkeypatch):
    write_log(tmp_path / "two" / "log.zarr", steps=8, batch=50)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "log.zarr").symlink_to(run / "log.zarr")
    runs = [str(tmp_path / name) for name in ("one", "two", "empty")]
    monkeypatch.setattr("jobs.analysis.plots.draw_all", lambda analysis, folder: None)  # tested above, and slow
    main([*runs, "--pairs", "1000", "--out", str(tmp_path / "both")])
    printed = capsys.readouterr()
    assert "the chosen pair has the lowest IoU in" in printed.out and "no augmentation log" in printed.err
    with (tmp_path / "both" / "comparison.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == runs[:2]
    assert {path.stem for path in (tmp_path / "both").glob("*.png")} == {
        f"compare_{name}" for name in ("lowest_iou_share", "mean_iou", "mean_loss_chosen", "iou", "importance")
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "runs: none given"),
        (["nowhere"], "no augmentation log"),
        (["nowhere", "neither"], "none of the 2"),
        (["RUN", "--pairs", "10"], "10 are too few"),
        (["RUN", "--steps", "30:"], "30: holds no rows"),
    ],
)
def test_bad_input(run, argv, message):
    with pytest.raises(InputError, match=message):
        main([str(run) if word == "RUN" else word for word in argv])


def test_pair_data_belongs_to_images(run):
    rows = next(iter(open_log(run / "log.zarr").chunks()))
    data = pair_data(rows)
    assert data.metrics_RF.shape == (6_000, 7) and data.images == 1_000
    np.testing.assert_array_equal(data.image_R[6:12], rows.sample_B[1])
    np.testing.assert_array_equal(data.loss_R[6:12], rows.loss_BP[1])
