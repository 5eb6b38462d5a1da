"""The stream: a function of the position alone, whatever the batch, the threads, the world, the damage."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from view_pictures import jpeg, truncated
from view_shards import damage, opened, size_of, write_shards

from pipelines.batch import Order, Reader, ScoringViews, ViewBatch
from pipelines.colour_host import fused
from pipelines.crop import crop_views
from pipelines.decode import PillowDecoder
from pipelines.draw import draw, static_colour
from pipelines.params import FIELDS
from pipelines.policies import build_policy
from pipelines.stream import ViewStream, cores
from shards.errors import InputError
from shards.reader import SampleError

SIZE = 20
POLICY = build_policy("byol", SIZE, 3)
MULTI_CROP = build_policy("dino", SIZE, 2, 3)
BACKENDS = ["host", "device"]


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_torchs() -> Iterator[None]:
    """Small tensors: torch's own threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, Order]:
    folder = tmp_path_factory.mktemp("shards")
    return opened([write_shards(folder / "real"), write_shards(folder / "made", 20, 7, "synthetic")], (0.6, 0.4))


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reader, Order]:
    """Two samples no decoder takes, one of another size than its manifest says, one with a flipped byte."""
    torn = truncated(jpeg(*size_of(3))).tobytes()
    other = jpeg(50, 50).tobytes()
    manifest = write_shards(tmp_path_factory.mktemp("broken") / "real", contents={3: torn, 4: torn, 17: other})
    damage(manifest, 30)
    return opened([manifest])


def taken(data: tuple[Reader, Order], batches: int, batch: int = 8, **options: object) -> list[ViewBatch]:
    arguments: dict = {"policy": POLICY, "seed": 7, "threads": 2, "prefetch": 1} | options
    with ViewStream(*data, batch=batch, **arguments) as stream:
        return list(itertools.islice(stream, batches))


def by_position(batches: list[ViewBatch]) -> dict[int, tuple]:
    """Everything about each row, by its global position."""
    return {
        batch.position + row: (
            int(batch.sample_B[row]),
            int(batch.source_B[row]),
            int(batch.epoch_B[row]),
            int(batch.label_B[row]),
            batch.sizes_B2[row].tolist(),
            [getattr(batch.params, name)[row].tolist() for name in FIELDS],
            [crops[row] for crops in (*batch.crops, *(batch.selection_crops or ()))],
        )
        for batch in batches
        for row in range(len(batch))
    }


def same(a: dict[int, tuple], b: dict[int, tuple]) -> bool:
    return a.keys() == b.keys() and all(
        a[p][:-1] == b[p][:-1] and all(torch.equal(x, y) for x, y in zip(a[p][-1], b[p][-1], strict=True)) for p in a
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["data", "broken"])
def test_rows_do_not_depend_on_batch_threads_prefetch_or_world(
    which: str, backend: str, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(which)
    named = {"backend": backend, "max_failure_share": 1.0}
    whole = by_position(taken(source, 6, 8, **named))
    assert sorted(whole) == list(range(48))
    assert same(whole, by_position(taken(source, 2, 24, threads=1, prefetch=0, **named)))
    assert same(whole, by_position(taken(source, 16, 3, threads=3, prefetch=4, **named)))
    ranks = [taken(source, 4, 4, rank=rank, world=3, **named) for rank in range(3)]
    assert [batch.position for batch in ranks[1]] == [4 + 12 * step for step in range(4)]
    assert same(whole, by_position([batch for batches in ranks for batch in batches]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["data", "broken"])
def test_a_resumed_stream_goes_on_bit_for_bit(which: str, backend: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(which)
    named = {"backend": backend, "max_failure_share": 1.0, "policy": MULTI_CROP}
    whole = by_position(taken(source, 5, 8, **named))
    first = by_position(taken(source, 2, 8, **named))
    assert same(whole, first | by_position(taken(source, 3, 8, position=16, **named)))


def test_views_are_crops_and_colours_of_the_drawn_parameters(data: tuple[Reader, Order]) -> None:
    reader, order = data
    (batch,) = taken(data, 1, policy=MULTI_CROP)
    samples = order.at(0, 8)
    assert np.array_equal(batch.sample_B, samples.ids)
    columns = reader.columns(batch.sample_B)
    assert np.array_equal(batch.label_B, columns.label)
    assert np.array_equal(batch.sizes_B2, np.stack([columns.height, columns.width], 1))
    params = draw(MULTI_CROP, samples.ids, samples.epochs, 7, batch.sizes_B2)
    assert all(np.array_equal(getattr(batch.params, name), getattr(params, name)) for name in FIELDS)
    images = PillowDecoder().decode([item for item in reader.read(batch.sample_B) if isinstance(item, np.ndarray)])
    for group, span, crops in zip(MULTI_CROP.groups, MULTI_CROP.spans, batch.crops, strict=True):
        assert crops.shape == (8, group.count, 3, group.size, group.size) and crops.dtype == torch.float32
        for row, image in enumerate(images):
            assert isinstance(image, Tensor)
            expected = torch.empty(group.count, group.size, group.size, 3, dtype=torch.uint8)
            crop_views(image, params[row, span], expected)
            views = torch.empty(group.count, 3, group.size, group.size)
            fused(expected.numpy(), params[row, span], views)
            assert torch.equal(crops[row], views)


def test_both_backends_give_nearly_the_same_views(data: tuple[Reader, Order]) -> None:
    (host,), (device,) = taken(data, 1, 16, backend="host"), taken(data, 1, 16, backend="device")
    assert all(np.array_equal(getattr(host.params, name), getattr(device.params, name)) for name in FIELDS)
    apart = (host.crops[0] - device.crops[0]).abs() * 0.225 * 255
    # Solarize jumps at its threshold, where the backends' last bit decides.
    calm = torch.from_numpy(~host.params.solarize)
    assert apart[calm].mean() < 0.8 and apart[calm].quantile(0.999) < 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_colour_is_close_to_fused(data: tuple[Reader, Order], backend: str) -> None:
    (quick,), (exact,) = (taken(data, 1, 16, backend=backend, colour=colour) for colour in ("fused", "exact"))
    calm = torch.from_numpy(~quick.params.solarize)
    apart = (quick.crops[0] - exact.crops[0])[calm].abs() * 0.225 * 255
    assert 0 < apart.mean() < 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_samples_are_replaced_and_reported(broken: tuple[Reader, Order], backend: str) -> None:
    reader, order = broken
    reported: list[SampleError] = []
    named = {"backend": backend, "max_failure_share": 1.0, "quarantine": reported.append}
    batches = taken(broken, 5, 8, **named)
    expected = order.at(0, 40)
    ids = np.concatenate([batch.sample_B for batch in batches])
    changed = np.flatnonzero(ids != expected.ids)
    assert sorted(expected.ids[changed]) == [3, 4, 17, 30]
    assert not set(ids) & {3, 4, 17, 30}
    # A substitute may be broken as well, and is reported then too.
    tried: list[int] = []
    for first in (3, 4, 17, 30):
        chain = itertools.chain([first], (reader.substitute(first, attempt) for attempt in itertools.count(1)))
        tried += itertools.takewhile(lambda sample: sample in {3, 4, 17, 30}, chain)
    assert sorted(error.key for error in reported) == sorted(f"{sample:04d}" for sample in tried)
    assert [error for batch in batches for error in batch.replaced] == reported
    reasons = {error.key: error.reason for error in reported}
    assert "CRC" in reasons["0030"] and "0017" in reasons
    whole = {key: row for batch in batches for key, row in by_position([batch]).items()}
    for position in changed:
        substitute = np.array([ids[position]])
        columns = reader.columns(substitute)
        sizes = np.stack([columns.height, columns.width], 1)
        params = draw(POLICY, substitute, np.zeros(1, int), 7, sizes)
        found = whole[int(position)]
        assert found[3] == columns.label[0] and found[4] == sizes[0].tolist()
        assert found[5] == [getattr(params, name)[0].tolist() for name in FIELDS]


def test_both_backends_replace_alike(broken: tuple[Reader, Order]) -> None:
    host, device = (taken(broken, 5, 8, backend=backend, max_failure_share=1.0) for backend in BACKENDS)
    for a, b in zip(host, device, strict=True):
        assert np.array_equal(a.sample_B, b.sample_B)
        assert sorted(error.key for error in a.replaced) == sorted(error.key for error in b.replaced)


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_broken_samples_end_the_stream(tmp_path: Path, backend: str) -> None:
    torn = truncated(jpeg(40, 40)).tobytes()
    half = opened([write_shards(tmp_path / "half", contents=dict.fromkeys(range(0, 40, 2), torn))])
    with pytest.raises(InputError, match=r"samples cannot be used, more than 5\.0%") as caught:
        taken(half, 20, 8, backend=backend)
    assert "\n" not in str(caught.value)
    none = opened([write_shards(tmp_path / "none", contents=dict.fromkeys(range(40), torn))])
    with pytest.raises(InputError, match="16 samples in a row"):
        taken(none, 1, 8, backend=backend, max_failure_share=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_has_its_own_colours_and_size(data: tuple[Reader, Order], backend: str) -> None:
    named = {"policy": MULTI_CROP, "backend": backend}
    (plain,) = taken(data, 1, **named)
    assert plain.selection_crops is None and plain.scored is plain.crops
    (batch,) = taken(data, 1, selection=ScoringViews(size=10, static_colour=True), **named)
    assert all(torch.equal(a, b) for a, b in zip(batch.crops, plain.crops, strict=True))
    assert batch.scored is batch.selection_crops is not None
    assert [tuple(crops.shape) for crops in batch.scored] == [(8, 2, 3, 10, 10), (8, 3, 3, 4, 4)]
    (static,) = taken(data, 1, selection=ScoringViews(static_colour=True), **named)
    assert static.selection_crops is not None
    assert [crops.shape for crops in static.selection_crops] == [crops.shape for crops in static.crops]
    assert not torch.equal(static.selection_crops[0], static.crops[0])


def test_static_colours_are_those_of_one_draw(data: tuple[Reader, Order]) -> None:
    (batch,) = taken(data, 1, backend="host", selection=ScoringViews(static_colour=True))
    (plain,) = taken(data, 1, backend="host")
    params = static_colour(POLICY, plain.params, batch.sample_B, batch.epoch_B, 7)
    images = PillowDecoder().decode([item for item in data[0].read(batch.sample_B) if isinstance(item, np.ndarray)])
    crops = torch.empty(8, 3, SIZE, SIZE, 3, dtype=torch.uint8)
    for row, image in enumerate(images):
        assert isinstance(image, Tensor)
        crop_views(image, params[row], crops[row])
    expected = torch.empty(8, 3, 3, SIZE, SIZE)
    fused(crops.flatten(0, 1).numpy(), params, expected.flatten(0, 1))
    assert batch.selection_crops is not None and torch.equal(batch.selection_crops[0], expected)


def test_taking_rows(data: tuple[Reader, Order]) -> None:
    (batch,) = taken(data, 1, policy=MULTI_CROP.with_views(4), selection=ScoringViews(size=10))
    part = batch.rows(slice(2, 5))
    assert same(by_position([part]), {p: row for p, row in by_position([batch]).items() if 2 <= p < 5})


def view_threads() -> list[str]:
    return [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("hardviews-views", "hardviews-read"))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_leaves_no_thread(data: tuple[Reader, Order], backend: str) -> None:
    stream = ViewStream(*data, POLICY, seed=0, batch=8, backend=backend, threads=2, prefetch=3)
    next(stream)
    assert view_threads()
    stream.close()
    stream.close()
    assert not view_threads()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_of_ours_reaches_the_consumer(data: tuple[Reader, Order], backend: str) -> None:
    class Failing:
        def at(self, position: int, count: int) -> object:
            if position >= 16:
                raise ZeroDivisionError(position)
            return data[1].at(position, count)

    with ViewStream(data[0], Failing(), POLICY, seed=0, batch=8, backend=backend, threads=2) as stream:  # type: ignore[arg-type]
        assert len(list(itertools.islice(stream, 2))) == 2
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert not view_threads()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_no_more_batches_are_made_than_allowed(data: tuple[Reader, Order], prefetch: int) -> None:
    planned: list[int] = []

    class Watched:
        def at(self, position: int, count: int) -> object:
            planned.append(position)
            return data[1].at(position, count)

    with ViewStream(data[0], Watched(), POLICY, seed=0, batch=4, prefetch=prefetch, threads=2) as stream:  # type: ignore[arg-type]
        for step in range(1, 6):
            next(stream)
            assert len(planned) <= step + prefetch


def test_memory_is_used_again_but_never_under_a_living_tensor(data: tuple[Reader, Order]) -> None:
    with ViewStream(*data, POLICY, seed=0, batch=8, backend="host", threads=2, prefetch=1) as stream:
        kept = next(stream).crops[0][3, 1]
        copy = kept.clone()
        places = [next(stream).crops[0].data_ptr() for _ in range(12)]
        assert torch.equal(kept, copy)
    assert len(set(places)) < 6


def test_the_profile_says_where_time_went(data: tuple[Reader, Order]) -> None:
    with ViewStream(*data, POLICY, seed=0, batch=8, backend="host", threads=1) as stream:
        next(stream)
        profile = stream.profile()
    assert list(profile) == ["images", "wait", "draw", "read", "decode", "crop", "colour", "copy"]
    assert profile["images"] == 8 and all(profile[name] > 0 for name in ("wait", "decode", "crop", "colour"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "batch: 0"),
        ({"prefetch": -1}, "prefetch"),
        ({"threads": -1}, "threads"),
        ({"backend": "gpu"}, "auto, host, device"),
        ({"colour": "kornia", "backend": "host"}, "fused, clamped, exact"),
        ({"colour": "kornia", "backend": "device"}, "fused, clamped, exact"),
    ],
)
def test_bad_options_are_named(data: tuple[Reader, Order], options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        ViewStream(*data, POLICY, **{"seed": 0, "batch": 8} | options)


def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "50")
    assert cores() == 1


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not view_threads()
