"""What `gpu.py` leaves behind: one JSON of everything, a table for people, pictures where matplotlib is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import results
import tensor_rates
from gpu_run import ROOT

Parts = Mapping[str, Mapping[str, Any]]


def read_state(path: Path) -> dict[str, Any]:
    """An earlier run's state; empty where there is none that can be read."""
    try:
        return results.read(path)
    except (OSError, json.JSONDecodeError):
        return {}


def families(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: results.read(path) for path in sorted((folder / "families").glob("*.json"))}


def write_tables(folder: Path, parts: Parts, dry_run: bool) -> list[Path]:
    """gpu.json and summary.md."""
    measured = families(folder)
    results.write({"schema": 1, "dry_run": dry_run, "parts": parts, "families": measured}, folder / "gpu.json")
    (folder / "summary.md").write_text("\n".join(summary(parts, measured, dry_run)) + "\n")
    return [folder / "gpu.json", folder / "summary.md"]


def write_all(folder: Path, parts: Parts, dry_run: bool, archive: Path | None) -> list[Path]:
    """Tables and pictures, and the archive of all; what was written."""
    files = [*write_tables(folder, parts, dry_run), *_pictures(folder, families(folder))]
    return [*files, pack(folder, archive)] if archive is not None else files


def pack(folder: Path, archive: Path) -> Path:
    """The whole archive or the old one, without programs; a folder of the same name unpacks from it."""
    fresh = archive.with_name(f".{archive.name}")
    with tarfile.open(fresh, "w:gz") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".bin":
                file.add(path, Path(folder.name) / path.relative_to(folder))
    return fresh.replace(archive)


def _pictures(folder: Path, measured: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """By bench/plot.py, beside the files that it reads; elsewhere, later, where matplotlib is missing here."""
    drawable = [folder / "families" / f"{name}.json" for name, whole in measured.items() if whole["cases"]]
    if not drawable or importlib.util.find_spec("matplotlib") is None:
        return []
    command = [sys.executable, str(ROOT / "bench" / "plot.py"), *map(str, drawable)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"no pictures: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return [Path(line) for line in done.stdout.splitlines()]


def summary(parts: Parts, measured: Mapping[str, Mapping[str, Any]], dry_run: bool) -> Iterator[str]:
    """Markdown: how each part went, then a row a case."""
    machine = next((whole["machine"] for whole in measured.values()), {})
    if dry_run:
        yield "# Dry run on the CPU: nothing here ran on a GPU, and no time is worth quoting"
    else:
        yield f"# {machine.get('gpu', 'GPU')}"
    yield ""
    yield "| part | | seconds | |"
    yield "|---|---|---|---|"
    for name, part in parts.items():
        yield f"| {name} | {part['state']} | {part['seconds']:.0f} | {_cell(part['what'])} |"
    for name, part in parts.items():
        yield from _failures(name, part.get("found", {}).get("failures", ()))
    yield from _ceilings(parts.get("ceilings", {}).get("found", {}))
    for family, whole in measured.items():
        yield ""
        yield f"## {family}"
        yield ""
        yield "| operator | case | ours | rate | of the machine's | × peers, the fastest first |"
        yield "|---|---|---|---|---|---|"
        yield from map(_row, whole["cases"])
        for kind in ("failed", "absent", "left"):
            for entry in whole[kind]:
                yield f"| {entry['op']} | {entry['title']} | {kind} | | | {_cell(entry['reason'])} |"


#: more are in gpu.json: where a kernel is wrong, most say the same
_FAILURES = 40


def _failures(part: str, failures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if failures:
        yield from ("", f"## {part}: {len(failures)} failed", "")
    for failure in failures[:_FAILURES]:
        yield f"- `{failure['test']}`: {_cell(failure['message'])[:160]}"


def _ceilings(found: Mapping[str, Any]) -> Iterator[str]:
    if found:
        yield from ("", "## What the machine can do", "")
    if "rates" in found:
        yield from (*tensor_rates.rows(found["rates"]), "")
    for one in found.get("torch", ()):
        rate = one["gigabytes_per_second"]
        reached = (
            f"{rate:.0f} GB/s" if rate else f"{one['giga_operations_per_second'] / 1e3:.4g} T {one['operations_are']}/s"
        )
        yield f"- {one['name']}, by torch: {reached}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:300]


def _row(case: Mapping[str, Any]) -> str:
    ours = next(contender for contender in case["contenders"] if contender["role"] == "ours")
    rate, part = _rate(case, ours)
    ratios = sorted(case["ratios"], key=lambda ratio: ratio["median"])
    peers = ", ".join(f"{ratio['median']:.2f} {ratio['peer']}" for ratio in ratios)
    refused = "".join(f"; not timed: {name} ({_cell(why)[:80]})" for name, why in case["refused_peers"].items())
    doubt = "" if case["repetitions"]["settled"] else " (not settled)"
    time_ = f"{ours['seconds']['median'] * 1e6:.1f} µs{doubt}"
    return f"| {case['op']} | {case['title']} | {time_} | {rate} | {part} | {peers}{refused} |"


def _rate(case: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, str]:
    """Of what limits the case, and its part of the ceiling measured beside it."""
    ceilings = [contender for contender in case["contenders"] if contender["role"] == "ceiling"]
    unit = ours["operations_are"]
    for ceiling in ceilings:
        if ceiling["operations_are"] == unit and ceiling["giga_operations_per_second"]:
            rate, most = (each["giga_operations_per_second"] for each in (ours, ceiling))
            return f"{rate:.1f} G {unit}/s", f"{100 * rate / most:.0f} %"
    for ceiling in ceilings:
        if ceiling["gigabytes_per_second"]:
            rate, most = (each["gigabytes_per_second"] for each in (ours, ceiling))
            return f"{rate:.1f} GB/s", f"{100 * rate / most:.0f} %"
    return f"{ours['gigabytes_per_second']:.1f} GB/s", ""
