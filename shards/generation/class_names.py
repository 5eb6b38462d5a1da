"""Class names of data sets as diffusion pipelines know them: by name, by ImageNet's WordNet ids and words, as text."""

import difflib
import re
from collections import Counter
from typing import Any

from shards.errors import InputError


def find_class(name: str, known: dict[str, int]) -> int:
    """The number of a class by its name, that name in lower case with blanks, or its number as text."""
    for spelling in (name, name.lower(), name.lower().replace("_", " ")):
        if spelling in known:
            return known[spelling]
    if name.isdecimal() and int(name) in known.values():
        return int(name)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or sorted(known)[:8]
    raise InputError(
        f"--like: the pipeline has no class {name!r}; among its {len(set(known.values()))} are {', '.join(near)}; "
        "map names with --class-names FILE.json"
    )


def imagenet_classes() -> dict[str, int]:
    """Numbers of ImageNet's 1,000 classes by WordNet id and by those of their words that mean one class alone."""
    known = imagenet()
    words = [
        (word.strip().lower(), index)
        for index, words in enumerate(known.label_descriptions())
        for word in words.split(",")
    ]
    uses = Counter(word for word, _ in words)
    named = {word: index for word, index in words if uses[word] == 1}
    return named | {name: index for index, name in enumerate(known.label_names())}


def class_text(name: str) -> str:
    """A class name as a prompt takes it: ImageNet's WordNet ids as their first word, underscores as blanks."""
    if re.fullmatch(r"n\d{8}", name) and name in imagenet().label_names():
        name = imagenet().label_name_to_description(name).split(",")[0]
    return name.replace("_", " ")


def imagenet() -> Any:
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo()
