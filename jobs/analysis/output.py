"""What an analysis leaves behind besides its JSON: CSV tables, a comparison of runs, a few lines for the terminal."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.analysis import plots
from jobs.analysis.importance import PUBLISHED


def write_tables(analysis: Mapping[str, Any], folder: Path) -> None:
    """The analysis as CSV."""
    tables: dict[str, Sequence[Mapping[str, Any]]] = {
        "over_training": analysis.get("over_training", []),
        "by_source": [{"source": name, **facts} for name, facts in analysis.get("by_source", {}).items()],
        "by_class": analysis.get("by_class", []),
        "distributions": _distribution_rows(analysis),
        "zoom_distance": _grid_rows(analysis),
        "classifier": [analysis["classifier"]] if "classifier" in analysis else [],
    }
    if details := analysis.get("importance_details"):
        tables["importance"] = [
            {"measure": measure, **share, "published": PUBLISHED.get(share["feature"]) if measure == "tree" else None}
            for measure in ("loss", "tree", "correlation")
            for share in details[measure]
        ]
        tables["interactions"] = details["interactions"]
        tables["loss_curves"] = [
            {"feature": name, "metric": metric, "loss": loss}
            for name, curve in details["curves"].items()
            for metric, loss in zip(curve["metric"], curve["loss"], strict=True)
        ]
    for name, rows in tables.items():
        (folder / f"{name}.csv").unlink(missing_ok=True)  # no table of an earlier analysis beside this one's
        if rows:
            _write_csv(folder / f"{name}.csv", rows)


def _distribution_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"metric": name, "low": low, "high": high, "chosen": chosen, "all": every, "random": random}
        for name, h in analysis.get("histograms", {}).items()
        for low, high, chosen, every, random in zip(
            h["edges"], h["edges"][1:], h["chosen"], h["all"], h["random"], strict=False
        )
    ]


def _grid_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    grid = analysis.get("zoom_distance")
    if not grid:
        return []
    return [
        {"zoom": zoom, "distance": distance, "lift": lift}
        for zoom, row in zip(grid["zoom_edges"], grid["lift"], strict=False)
        for distance, lift in zip(grid["distance_edges"], row, strict=False)
    ]


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; the ends of error bars become columns NAME_low and NAME_high."""
    flat = [
        {key: value for key, value in row.items() if not isinstance(value, Mapping)}
        | {
            f"{name}_{end}": row[end][name]
            for end in ("low", "high")
            if isinstance(row.get(end), Mapping)
            for name in row[end]
        }
        for row in rows
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)), restval="")
        writer.writeheader()
        writer.writerows(flat)


def summary(analysis: Mapping[str, Any]) -> list[str]:
    """An analysis in a few lines."""
    lines = [f"{analysis['run']}: {analysis['rows']:,} images of {analysis['log_rows']:,} in the log"]
    if (share := analysis["lowest_iou_share"]) is not None:
        lines.append(f"  the chosen pair has the lowest IoU in {share:.1%} (chance {analysis['chance']:.1%})")
    if details := analysis.get("importance_details"):
        shares = ", ".join(f"{s['feature'].replace('_', ' ')} {s['share']:.1%}" for s in details["loss"])
        lines.append(f"  share of the loss's variance: {shares}; the forest's R² {details['r2_out_of_bag']:.2f}")
        if (drift := details["over_training_share"]) > 0.05:
            lines.append(f"  {drift:.1%} of that variance is the loss's drift over training, which no metric explains")
    if found := analysis.get("classifier"):
        lines.append(f"  the choice predicted from the parameters: {found['top1']:.1%} (chance {found['chance']:.1%})")
    return lines


def write_comparison(analyses: Mapping[str, Mapping[str, Any]], out: Path, pictures: bool = True) -> None:
    """Several runs' analyses side by side: comparison.csv and pictures. Keys are the runs' names."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for run, a in analyses.items():
        row = {"run": run, "rows": a["rows"], **a.get("choices", {})}
        row |= {f"importance_{share['feature']}": share["share"] for share in a.get("importance") or []}
        row["classifier_top1"] = (a.get("classifier") or {}).get("top1")
        rows.append(row)
    _write_csv(out / "comparison.csv", rows)
    if pictures:
        plots.draw_comparison(analyses, out)
