"""`hardviews bench step`: every side steps, and choices are judged by what each kind of step learns from."""

import json

import pytest
import torch

from jobs import cli
from jobs.benches import step
from jobs.benches.step import JUDGES, StepBench, photograph_views, selections, step_times
from models.precision import has_bf16_units

SMALL = ["--size", "16", "--patch", "8", "--depth", "1", "--batch", "8", "--rounds", "1"]


def test_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.run(["bench", "step", *SMALL, "--steps", "11", "--audit-every", "5", "--json"]) == 0
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    figures = json.loads(last)
    assert "by the target alone" in text
    assert figures["overhead"] == figures["full_ms"] / figures["plain_ms"]
    assert figures["baseline_overhead"] == figures["obvious_ms"] / figures["plain_ms"]
    if figures["precision"] == "fp32":  # then the full choice is what it is compared with
        assert figures["agreement_full"] > 0.99 and abs(figures["regret_full"]) < 1e-3
    for judge in JUDGES:
        assert 0 <= figures[f"agreement_{judge}"] <= 1 and f"regret_{judge}" in figures


def test_each_side_forwards_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images through the last blocks of both backbones in a step; the loss uses the target's features again."""
    bench = StepBench(size=16, patch=8, depth=2, batch=4, rounds=1)
    seen: dict[str, list[int]] = {}
    scored = selections(bench)

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
    again = 2 * has_bf16_units(torch.device("cpu"))  # bf16 scores, fp32 loss
    assert seen == {"plain": [2, 2], "precise": [6, 4], "full": [6, 4 + again], "target": [2, 4 + again]}


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
