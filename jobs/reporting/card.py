"""The model card: what a backbone was trained on, how, and what it scored, filled from the run."""

import json
from collections.abc import Sequence
from typing import Any

from jobs.reporting.html import number, percent
from jobs.reporting.rundata import RunData, addresses, flatten, is_finite


def model_card(run: RunData, step: int | None, which: str) -> str:
    """README.md of a hub folder: front matter, use, training data and settings, scores."""
    flat = flatten(run.config)
    name = run.name
    front = [
        "---",
        "library_name: timm",
        "license: apache-2.0",
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
        f"{flat.get('selection.rule', '?')} pair). {which.capitalize()} encoder"
        + (f", step {number(step)}." if step is not None else ", newest checkpoint."),
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "features = model(transform(image).unsqueeze(0))",
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
        json.dumps(run.config, indent=1, ensure_ascii=False),
        "```",
        "",
        "</details>",
        "",
        "## Scores",
        "",
        *_scores(run),
        "",
    ])  # fmt: skip


def _data(run: RunData, flat: dict[str, Any]) -> list[list[str]]:
    # Addresses of shards are places on somebody's machine: their last part names the data.
    rows = []
    for source in ("real", "synthetic"):
        names = [address.rstrip("/").rpartition("/")[2] for address in addresses(flat, source)]
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


def _scores(run: RunData) -> list[str]:
    rows = []
    for e in run.evaluations:
        s, model = e.get("scores", {}), e.get("model", {})
        if model.get("source") == "run" and is_finite(s.get("top1")):
            spread = s.get("top1_deviation")
            top1 = percent(s["top1"]) + (f" ± {number(100 * spread, 2)}" if is_finite(spread) else "")
            top5 = percent(s["top5"]) if is_finite(s.get("top5")) else ""
            rows.append([e["kind"], e.get("test", {}).get("name", ""), str(model.get("step") or "newest"), top1, top5])
    if not rows:
        return ["None measured: `hardviews evaluate knn --run RUN …` measures them."]
    return _table(["Evaluation", "Test images", "Step", "Top-1", "Top-5"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *lines]
