"""Results on disk and on paper: whole JSON files, and one line a ratio in a table."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).resolve().parent / "results"


def write(results: Mapping[str, Any], path: Path) -> None:
    """The whole file or the old one: written beside it, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            json.dump(results, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def read(path: Path) -> dict[str, Any]:
    """A file that `write` wrote."""
    return json.loads(path.read_text())


def table(results: Mapping[str, Any]) -> Iterator[str]:
    """A block of lines for each case: ours and the ceilings with their rates, then the ratios."""
    op = None
    for case in results["cases"]:
        if case["op"] != op:
            op = case["op"]
            yield f"\n{op}"
        repeated = case["repetitions"]
        doubt = "" if repeated["settled"] else "  NOT SETTLED: too few kept"
        if (repeated["cores_busy_elsewhere"] or 0) > 0.1:
            doubt += f"  (others used {repeated['cores_busy_elsewhere']:.1f} cores meanwhile)"
        yield f"  {case['title']}   [{repeated['kept']} kept, {repeated['dropped']} dropped]{doubt}"
        for contender in case["contenders"]:
            if contender["role"] != "peer":
                yield f"      {contender['name']:<44} {_time(contender)} {_rate(contender)}"
        for ratio in case["ratios"]:
            yield f"    × {_against(case, ratio):<44} {_spread(ratio)}"
        for reason in case["refused_peers"].values():
            yield f"    - NOT TIMED, wrong answer: {reason}"
        for peer in case["absent_peers"]:
            yield f"    - {peer:<44} absent"


def _time(contender: Mapping[str, Any]) -> str:
    return f"{contender['seconds']['median'] * 1e3:9.3f} ms"


def _rate(contender: Mapping[str, Any]) -> str:
    rates = []
    if contender["gigabytes_per_second"]:
        rates.append(f"{contender['gigabytes_per_second']:.1f} GB/s")
    if contender["giga_operations_per_second"]:
        giga = contender["giga_operations_per_second"]
        rate = f"{giga:.1f} G" if giga >= 0.1 else f"{1000 * giga:.1f} M"
        rates.append(f"{rate} {contender['operations_are']}/s")
    return "  " + ", ".join(rates)


def _against(case: Mapping[str, Any], ratio: Mapping[str, Any]) -> str:
    return f"{ratio['ours']} over {ratio['peer']}" if case["levels"] else str(ratio["peer"])


def _spread(ratio: Mapping[str, Any]) -> str:
    text = f"{ratio['median']:7.2f}  [{ratio['low']:.2f} to {ratio['high']:.2f}]"
    if ratio["target"] is not None:
        text += f"  target {ratio['target']:g}: {'met' if ratio['met'] else 'MISSED'}"
    return text
