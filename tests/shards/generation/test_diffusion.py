"""Pipelines: training, saving, loading without code or pickles, and images that depend on their own seed alone."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch

from shards.errors import InputError
from shards.generation import diffusion
from shards.generation.diffusion_training import train
from shards.generation.request import TrainSettings

CLASSES = ["dark", "light"]
TINY = TrainSettings(side=8, width=8, batch=16, steps=80, seconds=None, learning_rate=1e-2)


def two_classes(count: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images of 16 pixels a side, left half or right half white."""
    labels = np.arange(count) % 2
    images = np.zeros((count, 16, 16, 3), np.uint8)
    images[labels == 0, :, :8] = 255
    images[labels == 1, :, 8:] = 255
    return images, labels


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> diffusion.ClassPipeline:
    return train(*two_classes(), CLASSES, TINY, size=16)


@pytest.fixture(scope="module")
def saved(trained: diffusion.ClassPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "deep" / "own"
    diffusion.save(trained, folder, {"steps": 80})
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DiT and a text-to-image pipeline."""
    folder = tmp_path_factory.mktemp("pipelines")
    tiny_pipelines.dit().save_pretrained(folder / "dit")
    tiny_pipelines.stable_diffusion(folder / "tokenizer").save_pretrained(folder / "text")
    return folder


def sampler(pipeline, batch: int = 4, names=CLASSES, guidance: float | None = None) -> diffusion.Sampler:
    asked = diffusion.conditions(pipeline, names, "a {class}")
    return diffusion.Sampler(pipeline, asked, batch, steps=4, guidance=guidance)


def test_training_learns_the_classes(trained: diffusion.ClassPipeline) -> None:
    images, _ = sampler(trained, batch=16)([0] * 8 + [1] * 8, list(range(16)))
    left_is_lighter = images[:, :, :8].mean((1, 2, 3)) > images[:, :, 8:].mean((1, 2, 3))
    assert images.shape == (16, 16, 16, 3)
    assert left_is_lighter.tolist() == [True] * 8 + [False] * 8


def test_steps_alone_make_training_repeatable() -> None:
    short = TrainSettings(side=8, width=8, batch=4, steps=2, seconds=None)
    state = torch.random.get_rng_state()
    first, second = (train(*two_classes(8), CLASSES, short) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    for one, other in zip(first.unet.parameters(), second.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_time_limit_ends_training_and_progress_reaches_one() -> None:
    seen: list[tuple[float, int]] = []
    settings = TrainSettings(side=8, width=8, batch=2, steps=None, seconds=0.3)
    train(*two_classes(8), CLASSES, settings, report=lambda done, step, loss: seen.append((done, step)))
    shares = [done for done, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [step for _, step in seen] == list(range(1, len(seen) + 1))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"side": 10}, "side 10"), ({"width": 12}, "width 12"), ({"steps": None, "seconds": None}, "both None")],
)
def test_wrong_training_settings_are_named(change: dict[str, int], named: str) -> None:
    settings = TrainSettings(**({"steps": 1} | change))
    with pytest.raises(InputError, match=named):
        train(*two_classes(4), CLASSES, settings)


def test_training_needs_images() -> None:
    with pytest.raises(InputError, match="no images"):
        train(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, int), CLASSES, TINY)


@pytest.mark.parametrize(("side", "levels"), [(8, 2), (12, 3), (16, 3), (32, 4)])
def test_networks_of_all_sides_take_their_images(side: int, levels: int) -> None:
    pipeline = diffusion.small_pipeline(side, 8, 3, CLASSES)
    assert len(pipeline.unet.config["block_out_channels"]) == levels
    images, _ = diffusion.Sampler(pipeline, [0], 1, 1, 1.0)([0], [0])
    assert images.shape == (1, side, side, 3)


def test_the_demo_network_has_its_published_size() -> None:
    network = diffusion.small_pipeline(8, 32, 1, [str(digit) for digit in range(10)]).unet
    assert sum(parameter.numel() for parameter in network.parameters()) == 685_985


def test_a_saved_pipeline_gives_the_same_images(trained: diffusion.ClassPipeline, saved: Path) -> None:
    loaded = diffusion.load(saved)
    assert isinstance(loaded, diffusion.ClassPipeline)
    assert loaded.classes == CLASSES
    assert not list(saved.rglob("*.bin"))
    before, _ = sampler(trained)([0, 1, 0, 1], [1, 2, 3, 4])
    after, _ = sampler(loaded)([0, 1, 0, 1], [1, 2, 3, 4])
    assert np.array_equal(before, after)


def test_outputs_are_one_image_in_three_forms(trained: diffusion.ClassPipeline) -> None:
    def output(kind: str):
        generator = torch.Generator().manual_seed(0)
        return trained([1], num_inference_steps=2, generator=generator, output_type=kind).images[0]

    array, tensor = output("np"), output("pt")
    assert np.array_equal(array, tensor.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(output("pil")), np.round(array * 255).astype(np.uint8))


@pytest.mark.parametrize("kind", ["own", "dit", "text"])
def test_an_image_depends_on_its_class_and_seed_alone(kind: str, saved: Path, others: Path) -> None:
    names = ["tench", "cock"]
    pipeline = diffusion.load(saved if kind == "own" else others / kind)
    if kind == "dit":
        diffusion.keep_drawless(pipeline)
    draw = sampler(pipeline, names=CLASSES if kind == "own" else names)
    labels, seeds = [0, 1, 0, 1, 1, 0], [11, 12, 13, 14, 15, 16]
    together = np.concatenate([draw(labels[:4], seeds[:4])[0], draw(labels[4:], seeds[4:])[0]])
    torch.manual_seed(99)
    for rows in ([5, 0, 3], [2], [4, 1]):  # other companions, other places, other batch lengths
        images, blanked = draw([labels[row] for row in rows], [seeds[row] for row in rows])
        assert np.array_equal(images, together[rows])
        assert blanked == [False] * len(rows)
    assert len({image.tobytes() for image in together}) == 6
    other_class = draw([1], [11])[0]
    assert not np.array_equal(other_class[0], together[0])


def test_another_batch_size_changes_no_more_than_rounding(trained: diffusion.ClassPipeline) -> None:
    labels, seeds = [0, 1] * 4, list(range(8))
    large, _ = sampler(trained, batch=8)(labels, seeds)
    small = np.concatenate([sampler(trained, batch=1)([labels[i]], [seeds[i]])[0] for i in range(8)])
    assert np.abs(large.astype(int) - small).max() <= 1


def test_guidance_reaches_the_pipeline(trained: diffusion.ClassPipeline) -> None:
    images = [sampler(trained, batch=1, guidance=scale)([0], [3])[0] for scale in (1.0, 1.5, 4.0)]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])
    assert np.array_equal(images[1], sampler(trained, batch=1)([0], [3])[0])  # the default


def test_a_stochastic_scheduler_of_dit_is_replaced(others: Path) -> None:
    pipeline = diffusion.load(others / "dit")
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    diffusion.keep_drawless(pipeline)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    kept = pipeline.scheduler
    diffusion.keep_drawless(pipeline)
    assert pipeline.scheduler is kept


def test_conditions_by_kind(trained: diffusion.ClassPipeline, others: Path) -> None:
    assert diffusion.conditions(trained, ["light", "dark"], "") == [1, 0, 2]
    dit = diffusion.load(others / "dit")
    # By WordNet id, word, number; the last means no class, which DiT is not asked for.
    assert diffusion.conditions(dit, ["n01440764", "Goldfish", "great_white_shark", "7"], "") == [0, 1, 2, 7, None]
    text = diffusion.load(others / "text")
    asked = diffusion.conditions(text, ["n01440764", "school_bus"], "a {class}!")
    assert asked == ["a tench!", "a school bus!", None]
    assert diffusion.conditions(text, ["x"], "anything") == ["anything", "anything"]


def test_an_unknown_class_is_named_with_its_neighbours(trained: diffusion.ClassPipeline) -> None:
    with pytest.raises(InputError, match=r"no class 'lihgt'.* are light; map names with --class-names"):
        diffusion.conditions(trained, ["dark", "lihgt"], "")


def test_dit_needs_a_class_for_every_image(others: Path) -> None:
    with pytest.raises(InputError, match="DiTPipeline needs a class for every image"):
        sampler(diffusion.load(others / "dit"), names=["tench"])([0, -1], [1, 2])


def test_unlabelled_images_come_from_the_class_of_none(trained: diffusion.ClassPipeline) -> None:
    draw = sampler(trained, batch=2)
    assert not np.array_equal(draw([-1], [5])[0], draw([0], [5])[0])


def test_pixels_that_are_not_finite_stop_the_generation(trained: diffusion.ClassPipeline) -> None:
    broken = diffusion.small_pipeline(8, 8, 1, CLASSES)
    for parameter in broken.unet.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(InputError, match="--precision"):
        sampler(broken, batch=1)([0], [0])


def test_the_fingerprint_follows_every_file_that_counts(saved: Path, tmp_path: Path) -> None:
    before = diffusion.fingerprint(saved)
    copy = copied(saved, tmp_path)
    (copy / "training.json").write_text("{}")
    (copy / "picture.png").write_bytes(b"")
    assert diffusion.fingerprint(copy) == before
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    assert diffusion.fingerprint(copy) != before


def test_pickles_are_not_read(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="unet has pickled weights alone"):
        diffusion.load(folder)


def test_code_in_a_pipeline_folder_is_not_run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(saved, tmp_path)
    (folder / "unet" / "evil.py").write_text("import sys\nsys.modules['was_run'] = sys\n\nclass UNet2DModel: ...\n")
    change_index(folder, unet=["evil", "UNet2DModel"])
    with pytest.raises(InputError, match="its own code"):
        diffusion.load(folder)
    change_index(folder, unet=["diffusers", "UNet2DModel"], _class_name=["evil", "Pipeline"])
    with pytest.raises(InputError, match="none of diffusers"):
        diffusion.load(folder)
    assert "was_run" not in sys.modules


def test_folders_that_hold_no_pipeline(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index\.json there.*--train-on"):
        diffusion.locate(str(tmp_path))
    with pytest.raises(InputError, match="no readable model_index"):
        diffusion.load(tmp_path)
    folder = copied(saved, tmp_path)
    assert diffusion.locate(str(folder)) == folder
    next((folder / "unet").glob("*.safetensors")).write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be loaded"):
        diffusion.load(folder)
    assert diffusion.class_of(folder) == "ClassPipeline"


def test_a_hub_name_is_downloaded_at_its_revision_as_safetensors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def download(name: str, revision: str | None, use_safetensors: bool) -> str:
        asked.append((name, revision, use_safetensors))
        return str(saved)

    monkeypatch.setattr(diffusion.DiffusionPipeline, "download", download)
    assert diffusion.locate("someone/some-model") == saved
    assert diffusion.locate("someone/some-model@v1.0") == saved
    assert asked == [("someone/some-model", None, True), ("someone/some-model", "v1.0", True)]


def test_a_hub_that_does_not_answer_is_one_line() -> None:
    with pytest.raises(InputError, match="no such folder, and the hub does not give it") as raised:
        diffusion.locate("nobody/nothing-of-that-name")
    assert "\n" not in str(raised.value)


def test_without_diffusers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # makes its import fail
    spec = importlib.util.spec_from_file_location("diffusion_again", diffusion.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(InputError, match=r"pip install '\.\[generate\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def copied(folder: Path, target: Path) -> Path:
    """A copy of a pipeline's folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            copy = target / "copy" / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target / "copy"


def change_index(folder: Path, **values: object) -> None:
    """Changes entries of a pipeline's model_index.json."""
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_repeat_on_a_gpu(precision: str, saved: Path) -> None:
    draw = sampler(diffusion.load(saved, "cuda", precision))
    labels, seeds = [0, 1, 0, 1], [1, 2, 3, 4]
    first, _ = draw(labels, seeds)
    assert np.array_equal(draw(labels, seeds)[0], first)
    alone, _ = draw([0], [3])
    assert np.abs(alone[0].astype(int) - first[2]).max() <= 1
    assert first.std() > 10
