"""The report: what it says of a run, what it says where something is missing, and that nothing in it can break out."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_runs import hard_views, make_run

from jobs import report
from jobs.reporting import charts, html
from jobs.reporting.charts import Bar, Series
from jobs.reporting.gallery import HardViews, view_card
from jobs.reporting.health import checks
from jobs.reporting.html import tag
from jobs.reporting.images import data_uri, picture, shrink
from jobs.reporting.rundata import read_run
from shards.errors import InputError


class Reader(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in html.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return reader


def test_report_is_one_well_formed_file_that_names_no_address(tmp_path: Path) -> None:
    out = report.write_report([make_run(tmp_path / "one")], tmp_path / "report.html")
    reader = read(out.read_text())
    for _, attributes in reader.seen:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert "http" not in out.read_text().replace("http-equiv", "")
    ids = [attributes["id"] for _, attributes in reader.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"] for name, attributes in reader.seen if name == "a"}
    assert targets <= {f"#{i}" for i in ids}


def test_report_shows_the_run_s_numbers(tmp_path: Path) -> None:
    text = report.write_report([make_run(tmp_path / "one")], tmp_path / "report.html").read_text()
    for words in ("62.0 %", "70.0 % ± 1", "41.0 %", "16.7 % by chance", "15.2 %", "shard-000001.tar", "synthetic"):
        assert words in text, words
    assert "The longest phase of a step is “forward” with 70 %" in text


def test_the_loss_is_drawn_beside_chance_and_marked_where_synthetic_negatives_are(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for row, line in enumerate(lines):
            line["train/chance"] = 9.5 if 10 <= row < 30 else 8.5
            if 10 <= row < 30:
                line["train/loss_real"] = line["train/loss"] - 1
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "state.json").write_text(json.dumps({"state": "finished", "verdict_figures": {"chance": 8.5}}))
    text = report.write_report(runs, tmp_path / "report.html").read_text()
    assert text.count("synthetic negatives begin: step 90") == text.count("synthetic negatives end: step 290") == 2
    assert text.count('class="reference dotted"') == 4 and ">against real negatives alone<" in text
    assert ">chance<" in text and "chance 8.5" in text  # the latter in the comparison
    assert read_run(runs[0]).real_loss()[1][10] == lines[10]["train/loss"] - 1 == lines[10]["train/loss_real"]
    assert read_run(make_run(tmp_path / "plain")).synthetic_span() == []


def test_several_runs_get_tabs_and_a_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", seed=1)]
    reader = read(report.write_report(runs, tmp_path / "report.html").read_text())
    tabs = [attributes for _, attributes in reader.seen if attributes.get("role") == "tab"]
    panels = {attributes["id"] for _, attributes in reader.seen if attributes.get("role") == "tabpanel"}
    assert [t["aria-selected"] for t in tabs] == ["true", "false", "false"]
    assert {t["aria-controls"] for t in tabs} == panels
    assert "seed" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("metrics.jsonl", "Curves need metrics.jsonl"),
        ("analysis/analysis.json", "hardviews analyse RUN"),
        ("quarantine.jsonl", "No sample was put aside"),
    ],
)
def test_missing_parts_leave_a_reason(tmp_path: Path, gone: str, said: str) -> None:
    run = make_run(tmp_path / "one")
    (run / gone).unlink()
    assert said in report.write_report([run], tmp_path / "report.html").read_text()


def test_one_step_one_value_and_no_evaluation_still_make_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one", lines=1)
    for file in (run / "evaluation").iterdir():
        file.unlink()
    text = report.write_report([run], tmp_path / "report.html").read_text()
    assert "single step" in text
    assert "Nothing was evaluated yet" in text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    (run / "analysis" / "analysis.json").write_text("{")
    (run / "evaluation" / "knn.json").write_text("[]")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    text = report.write_report([run], tmp_path / "report.html").read_text()
    assert "analysis.json cannot be read" in text
    assert "knn.json is not a JSON object" in text
    assert "70.0 %" in text


def test_a_class_without_test_images_has_a_row_in_the_confusion(tmp_path: Path) -> None:
    text = report.write_report([make_run(tmp_path / "one")], tmp_path / "report.html").read_text()
    assert "Confusion: knn" in text and text.count("emu without images") > 1


@pytest.mark.parametrize("content", ['{"kind": "knn", "confusion": [[1, 2], [3]]}', '{"kind": "knn", "scores": 3}',
                                     '{"kind": "knn", "per_class": [{}]}', '{"kind": "knn", "classes": [1],'
                                     ' "confusion": [[1, 2], [3, 4]]}'])  # fmt: skip
def test_no_section_ends_the_page(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    (runs[0] / "evaluation" / "knn.json").write_text(content)
    text = report.write_report(runs, tmp_path / "report.html").read_text()
    assert text.rstrip().endswith("</html>")
    assert "This part could not be made (" in text and "This part could not be made (" in capsys.readouterr().err
    assert "Images per second" in text  # of the other sections
    read(text)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run folder"):
        report.main([str(tmp_path)])
    with pytest.raises(InputError, match="runs: none given"):
        report.main([])


def test_main_writes_into_the_run_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "one")
    report.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size < 1_000_000


def test_names_from_files_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<script>alert(1)<")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "<img src=x onerror=alert(1)>": 1.0}) + "\n")
    text = report.write_report([run], tmp_path / "report.html").read_text()
    assert text.count("<script") == 1
    assert not re.search(r"<img[^>]*onerror", text)
    read(text)


def test_health_tells_a_sound_run_from_a_broken_one(tmp_path: Path) -> None:
    states = {check.name: check.state for check in checks(read_run(make_run(tmp_path / "one")))}
    assert states == {"State": "good", "Loss": "good", "kNN": "good", "Data": "warn"}
    run = make_run(tmp_path / "two")
    broken = [{"step": s, "train/loss": x, "knn/top1": k} for s, x, k in ((0, 7.0, 0.4), (1, float("inf"), 0.3))]
    broken[0] |= {"health/feature_std": 0.05, "health/rankme": 40.0}
    broken[1] |= {"health/feature_std": 0.001, "health/rankme": 1.1, "train/grad_norm": float("nan")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
    states = {check.name: check.state for check in checks(read_run(run))}
    assert [states[name] for name in ("Loss", "kNN", "Feature spread", "RankMe")] == ["bad"] * 4
    assert states["Gradients"] == "warn"


def test_a_verdict_stands_on_top_with_what_to_try_and_a_falling_rank_is_no_tick(tmp_path: Path) -> None:
    run = make_run(tmp_path / "one")
    words = {"verdict_reason": "loss 13.95, chance 13.86", "verdict_advice": "weaken the views"}
    (run / "state.json").write_text(json.dumps({"state": "finished", "verdict": "not-learning", **words}))
    lines = [{"step": step, "health/rankme": rank} for step, rank in ((40, 8.7), (240, 3.8))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, *others = checks(read_run(run))
    assert (first.name, first.state) == ("Verdict", "bad")
    assert first.text == "not-learning: loss 13.95, chance 13.86; what to try first: weaken the views"
    (rank,) = [check for check in others if check.name == "RankMe"]
    assert rank.state == "warn" and rank.text == "3.8 effective dimensions, 8.7 at the start"
    text = report.write_report([run], tmp_path / "report.html").read_text()
    assert re.search(r'class="tiles"><dl class="tile"><dt>Verdict</dt><dd>not learning</dd>', text)


# Charts


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0, 1) == [0, 0.5, 1.0]
    assert charts.ticks(0.42, 0.68) == [0.45, 0.5, 0.55, 0.6, 0.65]
    assert charts.ticks(3, 3) == [3]
    rng = np.random.default_rng(0)
    for low, width in zip(rng.normal(size=200) * 1e3, np.exp(rng.normal(size=200) * 5), strict=True):
        found = charts.ticks(low, low + width, most=5)
        assert 2 <= len(found) <= 5
        assert low - 1e-6 * width <= found[0] < found[-1] <= low + width * (1 + 1e-6)


def test_smooth_is_the_windowed_mean_without_what_is_not_finite() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=200)
    y[17] = np.inf
    got = charts.smooth(y, share=0.05)
    for i in range(200):
        window = y[max(0, i - 5) : i + 6]
        assert got[i] == pytest.approx(window[np.isfinite(window)].mean())


def test_line_chart_draws_gaps_and_states_its_story() -> None:
    y = np.array([1.0, np.nan, 3.0, 4.0])
    text = charts.line_chart("Loss", [Series("loss", np.arange(4.0), y)], x_label="step")
    (path,) = re.findall(r'<path d="([^"]*)"', text)
    assert path.count("M") == 2
    assert "Loss: loss from 1 to 4, highest 4" in text
    held = json.loads(html_unescape(re.findall(r'data-lines="([^"]*)"', text)[0]))
    assert held["lines"][0]["x"] == ["0", "2", "3"]
    with pytest.raises(ValueError, match="no finite value"):
        charts.line_chart("Loss", [Series("loss", np.arange(4.0), np.full(4, np.nan))], x_label="step")


def html_unescape(text: str) -> str:
    from html import unescape

    return unescape(text)


def test_bars_are_proportional_and_their_intervals_too() -> None:
    text = charts.bar_chart("Importance", [Bar("iou", 0.5, 0.25, 1.0), Bar("hue", 0.25)])
    assert re.findall(r'class="fill" style="width:([\d.]+)%', text) == ["50.00", "25.00"]
    assert 'style="left:25.00%;width:75.00%"' in text


def test_thin_keeps_the_ends() -> None:
    x, y = charts.thin(np.arange(10_000.0), np.arange(10_000.0) * 2)
    assert len(x) == charts.MOST_POINTS
    assert (x[0], x[-1]) == (0, 9999)
    assert (y == 2 * x).all()


# Pictures


def test_small_pictures_keep_every_pixel_and_large_ones_shrink() -> None:
    import base64
    import io

    from PIL import Image

    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (20, 32, 3), dtype=np.uint8)
    head, body = data_uri(small).split(",")
    assert head == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))) == small).all()
    assert shrink(np.zeros((400, 800, 3), np.uint8), 200).shape == (100, 200, 3)
    assert 'alt="a &quot;cat&quot;"' in picture(small, 'a "cat"')


def test_view_card_outlines_the_chosen_pair_and_sorts_by_loss() -> None:
    card = view_card(hard_views())
    reader = read(card)
    shown = [attributes for name, attributes in reader.seen if name == "img"]
    assert len(shown) == 5
    assert all(attributes["alt"] for attributes in shown)
    assert [a["alt"] for a in shown if a["alt"].endswith("in the chosen pair")] == [
        "View 3 of cat 7, in the chosen pair",
        "View 4 of cat 7, in the chosen pair",
    ]
    assert len([a for name, a in reader.seen if name == "rect" and a.get("class") == "chosen"]) == 2
    assert re.findall(r"<span>(\d · \d)", card) == ["3 · 4", "2 · 4", "2 · 3", "1 · 4", "1 · 3", "1 · 2"]


def test_many_pairs_are_cut_but_the_chosen_one_stays() -> None:
    row = hard_views(views=8)
    easiest = HardViews(**{**row.__dict__, "chosen": 0})
    card = view_card(easiest)
    assert "21 more pairs" in card
    assert re.search(r'class="row chosen"><span>1 · 2', card) or re.search(
        r'<span>1 · 2<span class="hidden"> chosen', card
    )


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b>", tag("i", "x"), title='"') == '<p title="&quot;">&lt;b&gt;<i>x</i></p>'
    assert tag("img", alt="", hidden=False, class_="a") == '<img alt="" class="a">'


@pytest.mark.parametrize(
    ("x", "text"),
    [(0.123456, "0.123"), (1234.5, "1,234"), (-2.0, "−2"), (float("nan"), "not a number"), (float("-inf"), "−∞")],
)
def test_numbers_read_well(x: float, text: str) -> None:
    assert html.number(x) == text


@pytest.mark.parametrize(("x", "text"), [(0.0123, "12.3 ms"), (4.2, "4.2 s"), (125, "2 min 5 s"), (7200, "2 h")])
def test_durations_read_well(x: float, text: str) -> None:
    assert html.seconds(x) == text
