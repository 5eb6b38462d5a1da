"""The model card: what a backbone was trained on, how, and what it scored, filled from the run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.reporting.html import number, percent
from jobs.reporting.protocols import described
from jobs.reporting.rundata import RunData, addresses, flatten, is_finite


def model_card(run: RunData, step: int, which: str, licence: str = "") -> str:
    """README.md of a hub folder about the encoder `which` at `step`: front matter, use, training data and settings,
    scores. It is made to be published: of addresses it holds the last part alone."""
    flat = flatten(run.config)
    name = run.name
    front = [
        "---",
        "library_name: timm",
        *([f"license: {licence}"] if licence else []),
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("image-feature-extraction", "timm", "self-supervised", "hardviews")),
        "---",
    ]
    size = flat.get("backbone.image_size", "?")
    return "\n".join([
        *front,
        f"# {name}",
        "",
        f"`{flat.get('backbone.name', 'backbone')}` at {size}×{size} pixels, pretrained without labels by hardviews "
        f"({flat.get('objective.name', 'objective not recorded')}, {flat.get('selection.views', '?')} views per image, "
        f"{flat.get('selection.rule', '?')} pair). {which.capitalize()} encoder, step {number(step)}.",
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        "import torch",
        "from PIL import Image",
        "",
        'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        'image = Image.open("image.jpg").convert("RGB")',
        "with torch.inference_mode():",
        "    features = model(transform(image).unsqueeze(0))",
        "```",
        "",
        "## Training data",
        "",
        *_table(["", ""], _data(run, flat)),
        "",
        "## Settings",
        "",
        *_table(["Setting", "Value"], _settings(run, flat)),
        "",
        "<details><summary>Whole configuration</summary>",
        "",
        "```json",
        json.dumps(without_places(run.config), indent=1, ensure_ascii=False),
        "```",
        "",
        "</details>",
        "",
        "## Scores",
        "",
        *_scores(run, step, which),
        "",
    ])  # fmt: skip


def last_part(address: str) -> str:
    """What names the data: all before it is a place on somebody's machine."""
    return address.rstrip("/").rsplit("/", 1)[-1]


def without_places(content: Any) -> Any:
    """The same with the last part alone of all addresses."""
    if isinstance(content, Mapping):
        return {key: without_places(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_places(value) for value in content]
    return last_part(content) if isinstance(content, str) else content


def _data(run: RunData, flat: dict[str, Any]) -> list[list[str]]:
    rows = []
    for source in ("real", "synthetic"):
        names = [last_part(address) for address in addresses(flat, source)]
        if names:
            rows.append([f"{source.capitalize()} images", ", ".join(names)])
    if any(row[0].startswith("Synthetic") for row in rows):
        real_too = any(row[0].startswith("Real") for row in rows)
        share = flat.get("data.synthetic_share") if real_too else 1.0
        rows.append(["Synthetic share", percent(share) if is_finite(share) else "not recorded"])
    return rows or [["Images", "not recorded"]]


def _settings(run: RunData, flat: dict[str, Any]) -> list[list[str]]:
    shown = (
        "objective.name", "views.policy", "selection.views", "selection.rule", "selection.encoder",
        "optimizer.name", "optimizer.lr", "optimizer.weight_decay", "batch", "epochs", "steps", "seed",
    )  # fmt: skip
    last = max((line.get("step", 0) for line in run.metrics), default=0)
    rows = [[key, str(flat[key])] for key in shown if flat.get(key) is not None]
    if run.origin:
        rows.append(["started from", run.origin])
    state = run.state
    verdict = [["verdict", f"{state['verdict']} ({state.get('verdict_reason')})"]] if state.get("verdict") else []
    return [*rows, *([["steps run", number(last)]] if last else []), *verdict]


def _scores(run: RunData, step: int, which: str) -> list[str]:
    """Scores of these weights, not of the run's others."""
    rows = []
    for e in run.evaluations:
        s, model = e.get("scores", {}), e.get("model", {})
        own = (model.get("source"), model.get("step"), model.get("which")) == ("run", step, which)
        if own and is_finite(s.get("top1")):
            spread = s.get("top1_deviation")
            top1 = percent(s["top1"]) + (f" ± {number(100 * spread, 2)}" if is_finite(spread) else "")
            top5 = percent(s["top5"]) if is_finite(s.get("top5")) else ""
            data = [last_part(e.get(role, {}).get("name", "")) for role in ("train", "test")]
            rows.append([e["kind"], *data, described(e.get("protocol") or {}), top1, top5])
    if not rows:
        return [f"None measured of step {step}: `hardviews evaluate knn --run RUN --step {step} …` measures them."]
    return _table(["Evaluation", "Learned from", "Test images", "Protocol", "Top-1", "Top-5"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines]
