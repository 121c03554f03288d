"""WordNet's database, read from where Debian's package wordnet-base puts it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_DIRECTORY = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
# @ hypernym, @i class of an instance, ~ hyponym, ~i instance
_ABOVE_OR_BELOW = ("@", "@i", "~", "~i")


class Synset(NamedTuple):
    """Words of one meaning, its definition with examples, and the places of the synsets right above and below it."""

    words: list[str]
    gloss: str
    neighbours: list[int]


def data_lines(parts: Sequence[str] = PARTS) -> list[str]:
    """The lines of the data files, one a synset, without their licence."""
    paths = [_DIRECTORY / f"data.{part}" for part in parts]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: install WordNet's database (Debian: wordnet-base)")
    return [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line[0] != " "]


def read_synsets(parts: Sequence[str] = ("noun", "verb")) -> list[Synset]:
    """The synsets of some parts of speech, in the order of the files; neighbours are of the same parts."""
    lines = [line.split(" | ", 1) for line in data_lines(parts)]
    fields = [head.split() for head, _ in lines]
    # a synset is known by its part of speech and its offset in the file
    places = {(each[2], each[0]): place for place, each in enumerate(fields)}
    found = []
    for each, (_, gloss) in zip(fields, lines, strict=True):
        count = int(each[3], 16)
        words = [word.replace("_", " ") for word in each[4 : 4 + 2 * count : 2]]
        first = 5 + 2 * count
        pointers = [each[first + 4 * i : first + 4 * i + 4] for i in range(int(each[first - 1]))]
        near = {places[part, offset] for kind, offset, part, _ in pointers if kind in _ABOVE_OR_BELOW}
        found.append(Synset(words, gloss.strip(), sorted(near)))
    return found
