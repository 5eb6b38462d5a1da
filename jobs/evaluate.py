"""`hardviews evaluate knn | linear | finetune | retrieval | maps`: what a backbone's features are worth."""

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from jobs.evaluation import protocols
from jobs.evaluation.maps import MapsConfig, draw_maps
from jobs.run.terminal import parse, tables
from shards.errors import InputError

# Kind → (flags, what does it). Scores are printed and kept as JSON; maps are pictures.
PROTOCOLS: dict[str, tuple[type, Callable[[Any], dict[str, Any]]]] = {
    "knn": (protocols.KnnConfig, protocols.evaluate_knn),
    "linear": (protocols.LinearProbeConfig, protocols.evaluate_linear),
    "finetune": (protocols.FinetuneProbeConfig, protocols.evaluate_finetune),
    "retrieval": (protocols.RetrievalConfig, protocols.evaluate_retrieval),
}


def main(argv: Sequence[str]) -> None:
    known = ", ".join([*PROTOCOLS, "maps"])
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: hardviews evaluate KIND [flags]\n\nkinds: {known}\n")
        print("`hardviews evaluate KIND --help` explains every flag.")
        print("Several processes: torchrun --nproc-per-node N -- $(which hardviews) evaluate KIND [flags]")
        return
    kind, *rest = argv
    if kind == "maps":
        for path in draw_maps(parse(MapsConfig, rest, prog="hardviews evaluate maps")):
            print(path)
        return
    if kind not in PROTOCOLS:
        raise InputError(f"evaluate: {kind} is no kind of evaluation; take one of {known}")
    flags, run = PROTOCOLS[kind]
    result = run(parse(flags, rest, prog=f"hardviews evaluate {kind}"))
    if result.get("leads", True):
        show(result)


def show(result: dict[str, Any]) -> None:
    """The scores as a table on stdout."""
    scores = result["scores"]
    table = Table("score", "value", title=f"{result['kind']}: {result['model']['name']} on {result['test']['name']}")
    for row in result.get("by_k", []):
        table.add_row(f"top-1, k = {row['k']}", f"{100 * row['top1']:.2f} %")
    for name, score in scores.items():
        if name.endswith("_deviation"):
            continue
        spread = scores.get(f"{name}_deviation")
        text = f"{score:.1f}" if name == "rankme" else f"{100 * score:.2f}"
        spread_text = "" if spread is None else f" ± {spread if name == 'rankme' else 100 * spread:.2f}"
        table.add_row(name, text + spread_text + ("" if name == "rankme" else " %"))
    tables.print(table)
    if "file" in result:
        print(result["file"])
