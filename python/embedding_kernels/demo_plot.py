"""The demo's picture: recall against bytes per vector."""

from __future__ import annotations

from pathlib import Path

from .demo_measure import METHODS, SearchResult

# blue, orange, green of the Okabe-Ito palette: told apart by colour-blind readers too
_STYLES = dict(zip(METHODS, (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^")), strict=True))


def plot_recall(results: list[SearchResult], caption: str, path: Path) -> None:
    """Write a PNG with Recall@1 and Recall@10 against bytes per vector, one line a method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True)
    for panel, name, recall in zip(panels, ("Recall@1", "Recall@10"), ("recall_at_1", "recall_at_10"), strict=True):
        for method, (colour, marker) in _STYLES.items():
            points = sorted((r.bytes_per_vector, getattr(r, recall), r.width) for r in results if r.method == method)
            sizes, values, _ = zip(*points, strict=True)
            panel.plot(sizes, values, color=colour, marker=marker, label=method)
            if method != "binary":
                above = {"textcoords": "offset points", "xytext": (-6, 6), "ha": "center", "fontsize": 8}
                for size, value, width in points:
                    panel.annotate(str(width), (size, value), color=colour, **above)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_xlabel("bytes per vector (numbers at the points: dimensions)")
        panel.set_ylabel(f"{name} (share of queries)")
        panel.grid(alpha=0.3)
        panel.margins(y=0.12)
    panels[0].legend(loc="lower right", frameon=False)
    figure.suptitle(caption, fontsize=11)
    figure.savefig(path, dpi=150)
