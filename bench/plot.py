"""Pictures from result files alone: ratios against peers with their quartiles, and rates beside the ceilings.

``python bench/plot.py [FILE ...]`` redraws; without files, everything in bench/results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_HERE = Path(__file__).resolve().parent
PLOTS = _HERE / "plots"
_MARKERS = "osD^vP*X"
_OURS_COLOUR = "#1f4e79"


def _colours(names: list[str]) -> dict[str, tuple[str, str]]:
    return {name: (f"C{i % 10}", _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}


def _subtitle(results: Mapping[str, Any]) -> str:
    machine, commit = results["machine"], results["git"]["commit"] or "uncommitted"
    dirty = " + changes" if results["git"]["dirty"] else ""
    return (
        f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, {machine['isa_level']} · "
        f"torch {results['versions']['torch']} · {commit[:10]}{dirty} · {results['date'][:10]}"
    )


def _in_order(cases: list[dict[str, Any]], key: str) -> list[str]:
    """Peers or levels, by first appearance."""
    return list(dict.fromkeys(ratio[key] for case in cases for ratio in case["ratios"]))


def _ratio_rows(axes: Axes, cases: list[dict[str, Any]], levels: bool) -> None:
    """A row a case, a mark a peer, whiskers from quartile to quartile, a bar where the target is."""
    styles = _colours(_in_order(cases, "ours" if levels else "peer"))
    for row, case in enumerate(cases):
        count = len(case["ratios"])
        for place, ratio in enumerate(case["ratios"]):
            name = ratio["ours" if levels else "peer"]
            colour, marker = styles[name]
            y = row + (place - (count - 1) / 2) * 0.8 / max(count, 4)
            whiskers = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axes.errorbar(ratio["median"], y, xerr=whiskers, fmt=marker, color=colour, markersize=5, capsize=3, lw=1.2)
            if ratio["target"] is not None and not levels:
                axes.plot([ratio["target"]] * 2, [row - 0.42, row + 0.42], color=colour, lw=2, alpha=0.45)
    for name, (colour, marker) in styles.items():
        axes.plot([], [], marker, color=colour, label=f"{name} over the level below" if levels else name)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000]
    low, high = axes.get_xlim()
    axes.set_xticks([t for t in ticks if low <= t <= high], [f"{t:g}×" for t in ticks if low <= t <= high])
    axes.minorticks_off()
    axes.set_xlim(low, high)
    _label_rows(axes, cases)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _label_rows(axes: Axes, cases: list[dict[str, Any]]) -> None:
    unsettled = [" (not settled)" * (not case["repetitions"]["settled"]) for case in cases]
    labels = [case["title"].removeprefix("levels: ") + mark for case, mark in zip(cases, unsettled, strict=True)]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    for row in range(1, len(cases)):
        axes.axhline(row - 0.5, color="grey", lw=0.3)


def _figure(groups: list[tuple[str, list[dict[str, Any]]]], results: Mapping[str, Any], title: str) -> tuple[Any, Any]:
    heights = [len(cases) + 1.2 for _, cases in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(11, 1.2 + 0.42 * sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    figure.suptitle(f"{title}\n{_subtitle(results)}", fontsize=10)
    for (name, _), axis in zip(groups, axes[:, 0], strict=True):
        axis.set_title(name, loc="left", fontsize=9, fontweight="bold")
    return figure, axes[:, 0]


def _groups(results: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(heading, cases): an operator's cases against peers; its cases by level."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"]:
        heading = f"{case['op']}, by level of instruction set" if case["levels"] else case["op"]
        found.setdefault(heading, []).append(case)
    return list(found.items())


def ratios(results: Mapping[str, Any], path: Path) -> None:
    """How many times as long a peer takes; right of 1 we are faster."""
    groups = _groups(results)
    figure, axes = _figure(groups, results, f"{results['family']}: time of a peer ÷ ours (bars: targets)")
    for (_, cases), axis in zip(groups, axes, strict=True):
        _ratio_rows(axis, cases, cases[0]["levels"])
    _save(figure, path)


def rates(results: Mapping[str, Any], path: Path) -> None:
    """Work that has to be done, a second, beside the machine's own rate at it in the same repetitions."""
    groups = _rate_groups(results)
    figure, axes = _figure(groups, results, f"{results['family']}: least work ÷ time, beside the machine's own rates")
    for (heading, cases), axis in zip(groups, axes, strict=True):
        by_bytes = heading.endswith("GB/s")
        for row, case in enumerate(cases):
            _rate_row(axis, row, case, "gigabytes_per_second" if by_bytes else "giga_operations_per_second")
        axis.plot([], [], "s", color=_OURS_COLOUR, label="embedding-kernels")
        axis.plot([], [], "|", color="black", markersize=10, label="peers")
        ceiling = "memory bandwidth" if by_bytes else "matrix product"
        axis.plot([], [], "|", color="crimson", markersize=10, markeredgewidth=2, label=ceiling)
        _label_rows(axis, cases)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _save(figure, path)


def _rate_groups(results: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Cases under the unit of what limits them: operations where a ceiling counts the same ones, else bytes."""
    found: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"]:
        if case["levels"]:
            continue
        ceilings = [c["operations_are"] for c in case["contenders"] if c["role"] == "ceiling"]
        unit = case["work"]["operations_are"]
        heading = f"{case['op']}, {'G ' + unit + '/s' if unit in ceilings and unit else 'GB/s'}"
        found.setdefault(heading, []).append(case)
    return list(found.items())


def _rate_row(axis: Axes, row: int, case: Mapping[str, Any], key: str) -> None:
    for contender in case["contenders"]:
        rate = contender[key]
        if contender["role"] == "ours":
            axis.barh(row, rate, height=0.5, color=_OURS_COLOUR, alpha=0.75)
        elif contender["role"] == "peer":
            axis.plot(rate, row, "|", color="black", markersize=12)
        elif rate:
            axis.plot(rate, row, "|", color="crimson", markersize=18, markeredgewidth=2)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def by_layer(results: Mapping[str, Any], path: Path) -> None:
    """What vectors read after each layer find, a picture a task and a line a variant; bands are 95 % intervals of the
    difference from the plain prompt."""
    tasks = [*results["rows"][0]["scores"]]
    variants = list(dict.fromkeys(row["variant"] for row in results["rows"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 4.2), layout="constrained")
    for task, axis in zip(tasks, axes, strict=True):
        for place, variant in enumerate(variants):
            rows = [row for row in results["rows"] if row["variant"] == variant]
            layers, scores = [row["layer"] for row in rows], [row["scores"][task] for row in rows]
            plain = [score["value"] - score["more_than_plain"] for score in scores]
            band = [[base + score[end] for base, score in zip(plain, scores, strict=True)] for end in ("low", "high")]
            axis.plot(layers, [score["value"] for score in scores], "o-", color=f"C{place}", ms=4, label=variant)
            axis.fill_between(layers, *band, color=f"C{place}", alpha=0.12, lw=0)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("read after layer", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{results['model']}\n{_subtitle(results)}", fontsize=8)
    _save(figure, path)


def view_cosines(results: Mapping[str, Any], path: Path) -> None:
    """Mean cosines of the views of a reranker, a row for each training: of a query's anchors, and of its passages."""
    rows = [row for row in results["rows"] if "cosines" in row]
    figure, axes = plt.subplots(len(rows), 2, figsize=(6.4, 2.9 * len(rows)), squeeze=False, layout="constrained")
    for row, pair in zip(rows, axes, strict=True):
        for (name, values), axis in zip(row["cosines"].items(), pair, strict=True):
            axis.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
            for i, line in enumerate(values):
                for j, value in enumerate(line):
                    colour = "white" if abs(value) > 0.6 else "black"
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
            axis.set_title(f"{name}, λ = {row['recipe']['orthogonal_weight']:g}", fontsize=9)
            axis.set_xticks(range(len(values)))
            axis.set_yticks(range(len(values)))
    figure.suptitle(f"cosine between views\n{_subtitle(results)}", fontsize=7)
    _save(figure, path)


def draw(results: Mapping[str, Any], name: str, directory: Path = PLOTS) -> list[Path]:
    """Every picture of one result file."""
    if "cases" not in results:
        path = directory / f"{name}.png"
        (view_cosines if results["family"] == "multi_view_training" else by_layer)(results, path)
        return [path]
    paths = [directory / f"{name}-{kind}.png" for kind in ("ratios", "rates")]
    ratios(results, paths[0])
    rates(results, paths[1])
    return paths


def main() -> None:
    files = [Path(argument) for argument in sys.argv[1:]] or [
        *sorted((_HERE / "results").glob("*.json")),
        *sorted((_HERE / "results" / "retrieval").glob("*-token_prepending_retrieval.json")),
        *sorted((_HERE / "results" / "retrieval").glob("*-multi_view_training.json")),
    ]
    for file in files:
        plots = PLOTS if _HERE / "results" in file.resolve().parents else file.parent
        for path in draw(json.loads(file.read_text()), file.stem, plots):
            print(path)


if __name__ == "__main__":
    main()
