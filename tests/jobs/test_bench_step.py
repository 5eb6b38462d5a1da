"""`hardviews bench step`: every side steps, and choices are judged by what each kind of step learns from."""

import json

import pytest

from jobs import cli
from jobs.benches import step
from jobs.benches.step import JUDGES, UNTAUGHT, StepBench, photograph_views, selections, step_times

SMALL = ["--size", "16", "--patch", "8", "--depth", "1", "--batch", "8", "--rounds", "1"]


def test_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.run(["bench", "step", *SMALL, "--steps", "11", "--audit-every", "5", "--json"]) == 0
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    figures = json.loads(last)
    assert "online alone" in text and f"target alone, in {figures['target_precision']}" in text
    assert figures["overhead"] == figures["full_ms"] / figures["plain_ms"]
    assert figures["baseline_overhead"] == figures["obvious_ms"] / figures["plain_ms"]
    if figures["precision"] == "fp32":  # then the full choice is what it is compared with
        assert figures["agreement"] > 0.99 and abs(figures["regret"]) < 1e-3
    for judge in JUDGES:
        assert 0 <= figures[f"agreement_{judge}_{judge}"] <= 1
        assert (f"agreement_{judge}_full" in figures) == (judge in UNTAUGHT)
    assert figures["regret_target"] == figures["regret_target_target"]


def test_each_side_forwards_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images through the last blocks of both backbones in a step; selection keeps what the loss would forward again."""
    bench = StepBench(size=16, patch=8, depth=2, batch=4, rounds=1)
    seen: dict[str, list[int]] = {}
    scored = selections(bench, bench.shape)

    def counted(self: step.Learner, views, selection):
        kind = next((name for name, s in scored.items() if s == selection), "plain")
        counts = {"online": 0, "target": 0}

        def hook(name):
            def count(_, inputs, __):
                counts[name] += len(inputs[0])

            return count

        hooks = [getattr(self.moby, name).backbone.blocks[-1].register_forward_hook(hook(name)) for name in counts]
        original(self, views, selection)
        for handle in hooks:
            handle.remove()
        seen[kind] = [counts["online"] / 4, counts["target"] / 4]

    original = step.Learner.step
    monkeypatch.setattr(step.Learner, "step", counted)
    step_times(bench)
    # The online backbone forwards all views and, of the chosen two, what is not linear. Where the target alone scores,
    # one image of four has no scores, and with half of it each other image three finalists.
    assert seen == {
        "plain": [2, 2],
        "precise": [6, 4],
        "full": [6, 4],
        "alone": [6, 2],
        "target": [2, 3.5],
        "early": [2, 2.75],
    }


@pytest.mark.parametrize(
    ("units", "taken"), [({"bf16", "int8"}, "bf16"), ({"bf16"}, "bf16"), ({"int8"}, "int8"), (set(), "same")]
)
def test_the_target_scores_in_what_the_device_is_fastest_in(
    units: set[str], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "has_units", lambda device, precision: precision in units)
    scored = selections(StepBench(), StepBench().shape)
    assert {name for name, selection in scored.items() if selection.precision == taken} >= {"target", "early"}
    assert scored["full"].precision == scored["alone"].precision == "auto"  # judged by how often they agree


def test_the_same_step_has_the_same_views() -> None:
    bench = StepBench(batch=4)
    views = photograph_views(bench, 16, 3)
    assert views.shape == (4, 4, 3, 16, 16) and views.equal(photograph_views(bench, 16, 3))
    assert not views.equal(photograph_views(bench, 16, 4))


@pytest.mark.parametrize("words", [["--batch", "0"], ["--rounds", "0"], ["--backbone", "resnet18"], ["--patch", "5"]])
def test_bad_values_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "step", *SMALL, "--steps", "0", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hardviews: ") and error.count("\n") == 1
