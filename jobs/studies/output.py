"""What a study leaves: the table, summary.json, runs.csv, results.png."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.run.folder import write_json
from jobs.studies.difference import in_points
from jobs.studies.plan import Study
from jobs.studies.plot import plot
from jobs.studies.results import MEASURES, RunResult
from jobs.studies.summary import beside, compared, summarise

BESIDE = {"pixels": "raw pixels", "untrained": "untrained"}


def write_results(
    out: Path, name: str, chosen: Study, results: Sequence[RunResult], settings: Mapping[str, Any]
) -> None:
    """summary.json (arms with what they change, means, deviations and differences; runs), runs.csv (a row per run),
    results.png."""
    summary = summarise(results)
    pairs = compared(summary, chosen)
    facts = {arm: {"changes": dict(chosen.arms[arm]), **summary[arm]} for arm in summary}
    for arm, own in facts.items():
        own["beside"] = {other: {m: asdict(d) for m, d in found.items()} for other, found in pairs[arm].items()}
        own |= {"time": chosen.time[arm]} if arm in chosen.time else {}
    content = {
        "study": name,
        "scored": dict(settings),
        **beside(results),
        "arms": facts,
        "runs": [asdict(result) for result in results],
    }
    write_json(out / "summary.json", content)
    with (out / "runs.csv").open("w", newline="") as file:
        plain = [name for name in asdict(results[0]) if name not in ("scores", "untrained", "pixels")]
        writer = csv.DictWriter(file, [*plain, *MEASURES], restval="")
        writer.writeheader()
        for result in results:
            row = asdict(result)
            writer.writerow({**{name: row[name] for name in plain}, **result.scores})
    if any(result.scores for result in results):
        plot(summary, chosen, out / "results.png")


def table_of(results: Sequence[RunResult], chosen: Study) -> Table:
    """By arm: mean ± deviation and number of each measure, kNN beside the arm that it is compared with and, in a study
    of costs, beside random pairs of the same time; verdicts; finished runs. Then raw pixels and untrained features."""
    summary = summarise(results)
    pairs = compared(summary, chosen)
    measures = [name for name in MEASURES if any(name in arm for arm in summary.values())]
    heads = [*(f"{MEASURES[name]} top-1" for name in measures), "kNN beside"]
    heads += ["kNN beside plain of the same time"] if chosen.time else []
    table = Table("arm", *heads, "verdict", "runs")
    for arm, own in summary.items():
        members = [result for result in results if result.arm == arm]
        done = sum(result.state == "done" for result in members)
        cells = [percent(own[name]) if name in own else "–" for name in measures]
        others = {other: found for other, found in pairs[arm].items() if other != "same time"}
        cells.append("; ".join(f"{o}: {in_points(found.get('knn'))}" for o, found in others.items()))
        if chosen.time:
            cells.append(in_points(pairs[arm].get("same time", {}).get("knn")))
        cells.append(", ".join(f"{count} {name}" for name, count in own["verdicts"].items()))
        table.add_row(arm, *cells, f"{done} of {len(members)}")
    for name, own in beside(results).items():
        cells = [percent(own[measure]) if measure in own else "–" for measure in measures]
        if own:
            table.add_row(BESIDE[name], *cells)
    return table


def percent(value: Mapping[str, Any]) -> str:
    """52.1 ± 0.4 % (3), with the number of runs."""
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.1f}"
    return f"{100 * value['mean']:.1f}{spread} % ({value['n']})"
