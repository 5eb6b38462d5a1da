"""`hardviews bench multicrop` and `hardviews bench negatives` at a size for tests."""

import itertools
import json

import pytest
import torch

from jobs import bench
from jobs.benches.multicrop import MulticropBench, candidate_loss, distributions, exact_choice, sampled
from models.objectives.dino import cross_entropies, pair_loss
from models.selection import pairs
from shards.errors import InputError

SMALL = MulticropBench(batch=3, global_views=3, local_views=5, trained=2, outputs=40, candidates=6)


def test_the_exact_choice_is_the_largest_loss_of_all_candidates() -> None:
    teacher, student = distributions(SMALL)
    every = [(*pair, *(3 + v for v in some)) for pair in pairs(3) for some in itertools.combinations(range(5), 2)]
    losses = torch.stack([candidate_loss(teacher, student, views) for views in every], 1)
    largest, views = exact_choice(teacher, student, 2)
    torch.testing.assert_close(largest, losses.max(1).values)
    assert [set(row) for row in views.tolist()] == [set(every[i]) for i in losses.argmax(1)]


def test_a_candidate_s_loss_is_dino_s() -> None:
    teacher, student = distributions(SMALL)
    cross = cross_entropies(teacher[:, [0, 2]], student[:, [0, 2, 4, 7]])
    torch.testing.assert_close(candidate_loss(teacher, student, [0, 2, 4, 7]), pair_loss(cross))


def test_candidates_are_pairs_of_global_views_with_different_local_ones() -> None:
    found = sampled(MulticropBench())
    assert len(found) == 128 and len({tuple(views) for views in found}) > 120
    for views in found:
        assert len(views) == len(set(views)) == 10 and max(views[:2]) < 4 <= min(views[2:]) and max(views) < 20


def test_figures_are_printed_as_a_table_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--batch 3 --global-views 3 --local-views 5 --trained 2 --outputs 40 --candidates 6 --rounds 1"
    bench.main(["multicrop", *sizes.split(), "--json"])
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    assert figures["speedup"] == pytest.approx(figures["loop_ms"] / figures["exact_ms"])
    assert figures["exact_difference"] < 1e-5
    assert figures["random_loss"] < figures["sampled_loss"] <= figures["largest_loss"]
    lost = figures["largest_loss"] - figures["sampled_loss"]
    assert figures["sampled_regret"] == pytest.approx(
        lost / (figures["largest_loss"] - figures["random_loss"]), rel=1e-2
    )
    assert "loop over 6 candidates" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--outputs 0", "outputs: 0 must be at least 1"),
        ("--global-views 1", "global_views: 1 leave no pair; give 2 or more"),
        ("--trained 9 --local-views 8", "trained: 9 is more than the 8 local views; lower it"),
    ],
)
def test_sizes_that_cannot_be_are_refused(flags: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench.main(["multicrop", *flags.split()])


def test_the_negatives_benchmark_tells_both_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--batch 4 --queue 32 --hardest 8 --count 3 --width 8 --rounds 1"
    bench.main(["negatives", *sizes.split(), "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert max(figures["gradient_difference"], figures["gradient_difference_cosine"]) < 1e-5
    for suffix in ("", "_cosine"):
        wanted = figures[f"naive{suffix}_ms"] / figures[f"closed{suffix}_ms"]
        assert figures[f"speedup{suffix}"] == pytest.approx(wanted)
    with pytest.raises(InputError, match="hardest: 9 is more than the queue's 8; lower it"):
        bench.main(["negatives", "--queue", "8", "--hardest", "9"])
