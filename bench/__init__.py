"""The measuring room: every public operator against its peers, in one protocol.

`BENCHMARKS` maps each operator to its cases; importing it measures nothing. ``python bench/run.py`` measures.
"""

from __future__ import annotations

from . import hamming, pooling
from .harness import Case

FAMILIES: dict[str, dict[str, list[Case]]] = {"hamming": hamming.BENCHMARKS, "pooling": pooling.BENCHMARKS}
BENCHMARKS: dict[str, list[Case]] = {op: cases for family in FAMILIES.values() for op, cases in family.items()}
