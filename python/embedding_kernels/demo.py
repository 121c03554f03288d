"""The main job: one Bible searched with the verses of another, as floats and as bits, beside FAISS.

Every verse of the World English Bible is encoded with all-MiniLM-L6-v2; King James verses are the queries, and the
verse of the same number is the one right answer.
"""

from __future__ import annotations

import json
import os
import platform
import random
import textwrap
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from . import __version__
from .demo_data import (
    KING_JAMES_PACKAGE,
    MODEL_PACKAGE,
    WORLD_ENGLISH_PACKAGE,
    Bible,
    EncodedTexts,
    MissingDemoPackageError,
    VectorCache,
    default_cache,
    minilm_directory,
    package_directory,
    read_bible,
)
from .demo_measure import (
    METHODS,
    RESCORE_MULTIPLIER,
    TOP,
    WIDTHS,
    FaissComparison,
    Paired,
    SearchResult,
    compare_encoding,
    compare_search,
    search_at,
)
from .index import BinaryIndex
from .models import Embedder

_QUERIES = 2000
_SAMPLE = 2000  # verses that sentence-transformers encodes too
_CHUNKS = 8  # in this many turns
_EXAMPLES = 3


@dataclass(frozen=True)
class DemoOptions:
    """What `embedding-kernels demo` is told."""

    limit: int | None = None
    output: Path = Path("demo-results")
    cache: Path | None = None
    model: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Task:
    """The verses searched, the queries, and the place of each query's right answer."""

    corpus: Bible
    ids: list[int]
    texts: list[str]
    query_ids: list[int]
    queries: list[str]
    truth: np.ndarray  # int64 [Q]


def run(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo; prints, writes ``results.json`` and ``recall.png``, and returns what the JSON holds.

    Raises:
        MissingDemoPackageError: a package of the ``demo`` extra is not installed.
        ValueError: bad options.
    """
    start = time.perf_counter()
    _check_packages(options)
    task = _read_task(options)
    console.print(
        f"[bold]{len(task.texts):,} verses[/] of the World English Bible, searched with "
        f"[bold]{len(task.queries):,}[/] of the King James Version (seed {options.seed}); the verse of the same number "
        "is the right answer."
    )
    model = options.model or minilm_directory()
    embedder = Embedder.from_pretrained(model)
    console.print(f"{embedder}\n", highlight=False)
    if embedder.get_embedding_dimension() < max(WIDTHS):
        raise ValueError(f"demo: the model must have at least {max(WIDTHS)} dimensions, got {embedder}")
    encoded = _encode_corpus(embedder, model, task, options, console)
    queries = embedder.encode(task.queries, show_progress_bar=True)
    encoding, difference = _compare_encoding(embedder, model, task, options)
    index = BinaryIndex()
    index.add(encoded.vectors)
    widths = tqdm([w for w in WIDTHS if w <= encoded.vectors.shape[1]], desc="Searching, by width", unit="width")
    results = [result for width in widths for result in search_at(width, index, encoded.vectors, queries, task.truth)]
    faiss = compare_search(index, queries)
    report = _report(options, task, embedder, encoded, encoding, difference, results, faiss)
    _print_recall(results, console)
    _print_speed(encoded, encoding, difference, faiss, console)
    _print_examples(task, index, queries, console)
    report["seconds"] = time.perf_counter() - start
    _write(report, results, task, options, console)
    return report


def _check_packages(options: DemoOptions) -> None:
    for package in ("sentence_transformers", "faiss", "matplotlib", "safetensors"):
        if find_spec(package) is None:
            raise MissingDemoPackageError(
                f"the demo needs {package.replace('_', '-')}, which is not installed: "
                'pip install "embedding-kernels[demo]"'
            )
    for package in (WORLD_ENGLISH_PACKAGE, KING_JAMES_PACKAGE, *([] if options.model else [MODEL_PACKAGE])):
        package_directory(package)
    if options.limit is not None and options.limit < 2:
        raise ValueError(f"demo: limit must be at least 2 verses, got {options.limit}")


def _read_task(options: DemoOptions) -> _Task:
    corpus, king_james = read_bible(WORLD_ENGLISH_PACKAGE), read_bible(KING_JAMES_PACKAGE)
    ids = list(corpus.verses)
    kept = ids[: options.limit]
    # three verses of Romans stand in other places in the two translations: they are no queries
    shared = [verse_id for verse_id in kept if verse_id in king_james.verses]
    count = min(len(shared), max(1, round(_QUERIES * len(kept) / len(ids))))
    query_ids = random.Random(options.seed).sample(shared, count)
    place = {verse_id: row for row, verse_id in enumerate(kept)}
    return _Task(
        corpus,
        kept,
        [corpus.verses[verse_id] for verse_id in kept],
        query_ids,
        [king_james.verses[verse_id] for verse_id in query_ids],
        np.array([place[verse_id] for verse_id in query_ids]),
    )


def _encode_corpus(
    embedder: Embedder, model: Path, task: _Task, options: DemoOptions, console: Console
) -> EncodedTexts:
    cache = VectorCache(options.cache or default_cache(), model)
    cached = cache.read(task.texts)
    if cached is not None:
        console.print(f"Encoded verses read from {cache.path(task.texts)}\n", highlight=False, soft_wrap=True)
        return cached
    start = time.perf_counter()
    vectors = embedder.encode(task.texts, show_progress_bar=True)
    encoded = EncodedTexts(vectors, time.perf_counter() - start, from_cache=False)
    try:
        cache.write(task.texts, encoded)
    except OSError as error:
        console.print(f"[yellow]Encoded verses could not be kept in {cache.directory}: {error}[/]")
    return encoded


def _compare_encoding(embedder: Embedder, model: Path, task: _Task, options: DemoOptions) -> tuple[Paired, float]:
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(model), device=str(embedder.device))
    count = max(2, round(_SAMPLE * len(task.texts) / 31_102))
    sample = random.Random(options.seed + 1).sample(task.texts, min(count, len(task.texts)))
    chunk = -(-len(sample) // _CHUNKS)
    # the first call of each pays for what later ones find ready
    embedder.encode(sample[:8]), peer.encode(sample[:8], show_progress_bar=False)
    with tqdm(total=len(sample), desc="Encoding in turns with sentence-transformers", unit="text") as bar:
        return compare_encoding(
            lambda texts: embedder.encode(texts, show_progress_bar=False),
            lambda texts: peer.encode(texts, show_progress_bar=False),
            sample,
            chunk,
            bar.update,
        )


def _print_recall(results: list[SearchResult], console: Console) -> None:
    table = Table(title="Recall by width", title_justify="left")
    for column in ("dimensions", "method", "bytes a vector", "R@1", f"R@{TOP}", "queries/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for result in results:
        first, last = result.method == METHODS[0], result.method == METHODS[-1]
        table.add_row(
            str(result.width) if first else "",
            result.method,
            f"{result.bytes_per_vector:,}",
            f"{result.recall_at_1:.3f}",
            f"{result.recall_at_10:.3f}",
            f"{result.queries_per_second:,.0f}",
            end_section=last,
        )
    console.print(table)
    console.print(
        "float: cosine, by matrix product and torch.topk; rescoring: the nearest "
        f"{RESCORE_MULTIPLIER} × {TOP} codes put in order by float query · bits.\n",
        highlight=False,
    )


def _print_speed(
    encoded: EncodedTexts, encoding: Paired, difference: float, faiss: FaissComparison, console: Console
) -> None:
    table = Table(title="Beside sentence-transformers and FAISS, in turns", title_justify="left")
    for column in ("work", "peer", "ours", "peer's", "ratio", "quartiles"):
        table.add_column(column, justify="left" if column in ("work", "peer") else "right")
    for work, peer, paired in (
        ("encode, texts/s", "sentence-transformers", encoding),
        ("search, queries/s", "IndexBinaryFlat", faiss.binary),
        ("+ rescoring", "semantic_search_faiss", faiss.rescored),
    ):
        low, high = paired.ratio_quartiles
        rates = f"{paired.ours_per_second:,.0f}", f"{paired.theirs_per_second:,.0f}"
        table.add_row(work, peer, *rates, f"{paired.ratio:.2f}", f"{low:.2f}–{high:.2f}")
    console.print(table)
    when = "in an earlier run" if encoded.from_cache else "in this run"
    rate = len(encoded.vectors) / encoded.seconds
    console.print(f"All {len(encoded.vectors):,} verses: {encoded.seconds:.0f} s, {rate:.0f} texts/s ({when}).")
    console.print(f"Vectors: largest difference from sentence-transformers {difference:.1e}.")
    wrong = [width for width, same in faiss.same_ids.items() if not same]
    verdict = f"[red]differ from FAISS at {wrong}[/]" if wrong else "[green]equal FAISS's exactly at every width[/]"
    console.print(f"Binary search: ids and distances {verdict} ({', '.join(map(str, faiss.same_ids))}).")
    console.print(
        f"Rescoring: {faiss.rescored_same_ids:.2%} of the ids are those of semantic_search_faiss, which leaves the "
        f"order of ties open; largest difference of a score {faiss.rescored_difference:.1e}.\n"
    )


def _print_examples(task: _Task, index: BinaryIndex, queries: np.ndarray, console: Console) -> None:
    scores, found = index.search(queries[:_EXAMPLES], 3, RESCORE_MULTIPLIER)
    console.print("[bold]Three queries and their first hits[/] (binary codes, rescored)")
    for row, verse_id in enumerate(task.query_ids[:_EXAMPLES]):
        console.print(f"\n[bold]{task.corpus.reference(verse_id)}[/] (King James): {_short(task.queries[row])}")
        for score, place in zip(scores[row], found[row], strict=True):
            if place < 0:
                continue
            mark = "[green]✓[/]" if place == task.truth[row] else " "
            name = task.corpus.reference(task.ids[place])
            console.print(f"  {mark} {score:6.3f}  {name}: {_short(task.texts[place])}", highlight=False)
    console.print()


def _short(text: str) -> str:
    return textwrap.shorten(text, 150, placeholder=" …")


def _report(
    options: DemoOptions,
    task: _Task,
    embedder: Embedder,
    encoded: EncodedTexts,
    encoding: Paired,
    difference: float,
    results: list[SearchResult],
    faiss: FaissComparison,
) -> dict[str, Any]:
    import faiss as faiss_package
    import sentence_transformers
    import transformers

    versions = {"embedding_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "faiss": faiss_package.__version__}
    versions |= {"sentence_transformers": sentence_transformers.__version__, "numpy": np.__version__}
    return {
        "seed": options.seed,
        "verses": len(task.texts),
        "queries": len(task.queries),
        "model": repr(embedder),
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": versions,
        "encode_all": {"seconds": encoded.seconds, "from_cache": encoded.from_cache},
        "encode_paired_with_sentence_transformers": asdict(encoding),
        "largest_difference_from_sentence_transformers": difference,
        "rescore_multiplier": RESCORE_MULTIPLIER,
        "search": [asdict(result) for result in results],
        "faiss": asdict(faiss),
    }


def _write(
    report: dict[str, Any], results: list[SearchResult], task: _Task, options: DemoOptions, console: Console
) -> None:
    from .demo_plot import plot_recall

    options.output.mkdir(parents=True, exist_ok=True)
    picture, numbers = options.output / "recall.png", options.output / "results.json"
    model = options.model.name if options.model else "all-MiniLM-L6-v2"
    caption = f"{len(task.texts):,} World English verses, {len(task.queries):,} King James queries, {model}"
    plot_recall(results, caption, picture)
    numbers.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"Picture: {picture}\nNumbers: {numbers}\n{report['seconds']:.0f} s in all.", highlight=False)
