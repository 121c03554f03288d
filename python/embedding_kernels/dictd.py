"""Reading dictionaries of the dictd format, as Debian's ``dict-*`` packages install them."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

_DIGITS = {
    letter: value for value, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
_METADATA = "00-database"  # headwords of the dictionary's own name, address and licence


@dataclass(frozen=True)
class Entry:
    """One article of a dictionary."""

    headwords: tuple[str, ...]  # in lower case; all that lead to the article, in the order of the index
    text: str


def entries(path: str | Path) -> list[Entry]:
    """The articles of a dictionary in the order of its text, without those that describe the dictionary.

    Args:
        path: ``NAME.index``; the texts are in ``NAME.dict.dz`` (gzip) or ``NAME.dict`` beside it. A line of the index
            is a headword, an offset and a length in bytes, separated by tabs, numbers to the base 64.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, or they do not fit each other; the message names the file and the line.
    """
    index = Path(path)
    text = _read_text(index)
    headwords: dict[tuple[int, int], list[str]] = {}
    for number, line in enumerate(_decode(index, index.read_bytes()).split("\n"), 1):
        if not line or line.startswith(_METADATA):
            continue
        fields = line.split("\t")
        try:
            start, length = _number(fields[1]), _number(fields[2])
        except (IndexError, KeyError):
            raise ValueError(
                f"{index}, line {number}: expected headword, offset and length, separated by tabs, got {line[:80]!r}"
            ) from None
        if start + length > len(text):
            raise ValueError(f"{index}, line {number}: an entry ends past the text's {len(text)} bytes")
        headwords.setdefault((start, length), []).append(fields[0])
    return [
        Entry(tuple(headwords[start, length]), _decode(index, text[start : start + length]).strip())
        for start, length in sorted(headwords)
    ]


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def _read_text(index: Path) -> bytes:
    if not index.is_file():
        raise FileNotFoundError(f"{index}: there is no such dictionary index")
    packed, plain = index.with_suffix(".dict.dz"), index.with_suffix(".dict")
    if packed.is_file():
        try:
            with gzip.open(packed) as file:  # dictzip only adds a table, which gzip passes over
                return file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{packed} cannot be unpacked: {error}") from error
    if plain.is_file():
        return plain.read_bytes()
    raise FileNotFoundError(f"{index} has no texts beside it: expected {packed.name} or {plain.name}")


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the dictionary must be in UTF-8: {error}") from error
