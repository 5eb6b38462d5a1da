"""`hardviews bench NAME`: measures a part of the system beside an honest baseline in the same run."""

import importlib

from shards.errors import InputError

# Benchmark → what it measures. Each lives in jobs/benches under its name and loads on use.
BENCHES = {
    "shards": "building and reading shards, the order of samples, shuffling",
    "views": "views per image, beside an ordinary loader",
    "step": "training steps, with and without selection and synthetic negatives",
    "colour": "colour of the views as it runs on a GPU, compiled and not",
    "training": "what the data, hard views and synthetic negatives cost of real training steps",
    "run": "what checkpoints and monitors add to a training step",
    "negatives": "synthetic negatives in closed form, beside building their vectors",
    "rules": "a step by each rule of choice, beside one on random pairs",
    "multicrop": "DINO's exact choice among multi-crop views, beside a loop over sampled candidates",
}


def usage() -> str:
    width = max(map(len, BENCHES))
    lines = [f"  {name:{width}}  {text}" for name, text in BENCHES.items()]
    return "usage: hardviews bench NAME [flags]\n\n" + "\n".join(lines)


def main(argv: list[str]) -> None:
    """Runs one benchmark.

    Raises:
        InputError: no name, or one that does not exist.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return
    if not argv or argv[0] not in BENCHES:
        given = f"{argv[0]!r} is not known" if argv else "no name given"
        raise InputError(f"bench: {given}; choose one of {', '.join(BENCHES)}")
    importlib.import_module(f"jobs.benches.{argv[0]}").main(argv[1:])
