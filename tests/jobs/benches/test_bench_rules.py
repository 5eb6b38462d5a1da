"""`hardviews bench rules` at a size for tests."""

import json

import pytest

from jobs import bench
from jobs.benches import rules
from jobs.studies.ready import COST, RULES


@pytest.mark.slow
def test_every_rule_is_timed_beside_random_pairs(capsys, monkeypatch):
    monkeypatch.setattr(rules, "TURN", 1)
    bench.main(["rules", "--width", "32", "--depth", "1", "--batch", "16", "--rounds", "1", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == set(RULES) == set(COST)
    assert figures["random"]["cpu"] == figures["random"]["clock"] == 1
    assert all(own["cpu_ms"] > 0 and own["cpu_low"] <= own["cpu"] <= own["cpu_high"] for own in figures.values())
    # Four views by both encoders are 8 forward passes beside a plain step's 8, of which the target's two serve again.
    units = {rule: own["units"] for rule, own in figures.items()}
    assert units["hard"] == 1.75 and units["hard-target"] == 1.25 and units["lowest-iou"] == 1
    assert units["hard-every4"] == 1 + 0.75 / 4
    assert units["hard-half"] == 1.25 and units["hard-bf16"] == 2
