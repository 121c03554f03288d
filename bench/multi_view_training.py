"""A small multi-view reranker, trained from nothing on WordNet, beside the order of BM25 that it is given.

``python bench/multi_view_training.py``. The task is that of `hypernyms.py`, the training that of
`multi_view_recipe.py`, whose settings were chosen on 300 queries that are not those of the report. Trained twice, with
and without the loss that keeps the views apart. With ``--directory`` an interrupted run goes on where it was, and the
models stay there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):  # run as a file: its package is the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import machine, plot, results
from bench.hypernyms import Task, gains, make_task, recall
from bench.multi_view_recipe import (
    SEED,
    Recipe,
    TrainingLists,
    first_embeddings,
    make_reranker,
    make_tokenizer,
    make_trainer,
)
from embedding_kernels.models import MultiViewReranker
from embedding_kernels.models.multi_view_training import last_checkpoint

_VALIDATION, _TEST, _RESAMPLES = 300, 1000, 10_000
_FOR_COSINES = 100  # queries
_RETRIEVAL = results.DIRECTORY / "retrieval"


def train(reranker: MultiViewReranker, lists: TrainingLists, directory: Path) -> dict[str, Any]:
    """Train it in place, from the last checkpoint of ``directory`` if it has one; what that took here."""
    trainer = make_trainer(reranker, lists, directory)
    last = last_checkpoint(directory)
    start, start_of_cpu = time.monotonic(), time.process_time()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model()
    return {
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - start_of_cpu,
        "resumed": last is not None,
        "log": [entry for entry in trainer.state.log_history if "list_loss" in entry],
    }


def reranked(reranker: MultiViewReranker, task: Task, queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """NDCG@10 of each query."""
    passages = [[task.texts[place] for place in row] for row in candidates]
    scores = reranker.score_batch([task.texts[query] for query in queries], passages)
    orders = [row[np.argsort(-own, kind="stable")] for row, own in zip(candidates, scores, strict=True)]
    return _gains(task, queries, orders)


def cosines(reranker: MultiViewReranker, task: Task, queries: np.ndarray, candidates: np.ndarray) -> dict[str, Any]:
    """Mean cosine of each pair of views ``[m, m]``: of the anchors of queries, and of their passages' own views."""
    found: dict[str, list[torch.Tensor]] = {"anchors": [], "views": []}
    for query, row in zip(queries, candidates, strict=True):
        ids, cu_seqlens, longest, cu_passages = reranker.tokenize([task.texts[query]], [[task.texts[i] for i in row]])
        with torch.inference_mode():
            views = reranker.model.encode(ids, cu_seqlens, longest)
            anchors = reranker.model.anchors(views, cu_passages)
        for name, vectors in (("anchors", anchors), ("views", views)):
            unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
            found[name].append((unit @ unit.transpose(1, 2)).mean(0))
    return {name: torch.stack(each).mean(0).tolist() for name, each in found.items()}


def difference(ours: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """The mean difference over queries, and its 95 % interval by a bootstrap over them."""
    draw = np.random.default_rng(SEED)
    more = ours - base
    means = [more[draw.integers(0, len(more), len(more))].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"more": float(more.mean()), "low": float(low), "high": float(high)}


def _gains(task: Task, queries: np.ndarray, orders: Any) -> np.ndarray:
    return np.array([gains(order, task.relevant[query]) for query, order in zip(queries, orders, strict=True)])


def _row(name: str, values: np.ndarray, base: np.ndarray) -> dict[str, Any]:
    row = {"name": name, "ndcg@10": float(values.mean()), **difference(values, base)}
    print(f"{name:<48} {row['ndcg@10']:.3f}   {row['more']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]", flush=True)
    return row


def measure(task: Task, recipe: Recipe, without: int, queries: np.ndarray, directory: Path) -> dict[str, Any]:
    """Train and compare; ``without`` is the number of lists of the run without the orthogonal loss."""
    candidates = task.candidates(queries)
    bm25 = _gains(task, queries, candidates)
    found = np.array([recall(row, task.relevant[query]) for query, row in zip(queries, candidates, strict=True)])
    first = [row[np.argsort(~np.isin(row, task.relevant[query]), kind="stable")] for query, row in
             zip(queries, candidates, strict=True)]  # fmt: skip
    print(f"BM25 finds {found.mean():.3f} of the relevant ones among its first hundred")
    print(f"{'order of the hundred':<48} NDCG@10, and how much more than BM25's [95 %]")
    rows = [_row("BM25's", bm25, bm25), _row("the relevant ones first", _gains(task, queries, first), bm25)]
    texts = [task.texts[place] for place in np.flatnonzero(task.allowed)]
    tokenizer = make_tokenizer(texts, recipe.vocabulary)
    embeddings = first_embeddings(tokenizer, texts, recipe.width)
    lists = TrainingLists(task, recipe)
    runs = {"orthogonal": lists}
    if without:
        runs["plain"] = TrainingLists(task, recipe._replace(lists=without, orthogonal_weight=0.0))
    for name, own in runs.items():
        reranker = make_reranker(tokenizer, embeddings, own.recipe)
        if own is lists:
            rows.append(_row("reranker before training", reranked(reranker, task, queries, candidates), bm25))
        spent = train(reranker, own, directory / name)
        title = f"reranker, {own.recipe.lists:,} lists, λ = {own.recipe.orthogonal_weight:g}"
        row = _row(title, reranked(reranker, task, queries, candidates), bm25)
        seen = cosines(reranker, task, queries[:_FOR_COSINES], candidates[:_FOR_COSINES])
        rows.append({**row, "recipe": own.recipe._asdict(), "training": spent, "cosines": seen})
        print(f"    {spent['seconds'] / 60:.0f} minutes, {spent['cpu_seconds'] / 60:.0f} of one core", flush=True)
    return {"recall@100": float(found.mean()), "rows": rows}


@contextlib.contextmanager
def _kept(directory: Path | None) -> Iterator[Path]:
    if directory is not None:
        yield directory
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What would fail after minutes of work is said at once."""
    for name, least in (("lists", 1), ("plain_lists", 0), ("queries", 1), ("threads", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    try:
        for folder in filter(None, (arguments.directory, arguments.output)):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{folder} must be a directory that can be written, got {error.strerror}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="where checkpoints and models stay; a run there is resumed")
    parser.add_argument("--lists", type=int, default=Recipe().lists, help="to train on")
    parser.add_argument("--plain-lists", type=int, default=4000, help="the same without the orthogonal loss; 0: not")
    parser.add_argument("--queries", type=int, default=_TEST, help="of the report; fewer keep nothing")
    parser.add_argument("--validation", action="store_true", help="report the other 300 queries; keeps nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=_RETRIEVAL)
    arguments = parser.parse_args()
    _refuse(parser, arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # every step has other shapes: 1,024 of oneDNN's primitives, its default, are gigabytes
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    torch.set_num_threads(arguments.threads)
    where = machine.facts(torch.device("cpu"), torch.get_num_threads())
    task = make_task(_VALIDATION, _TEST, SEED)
    queries = task.validation if arguments.validation else task.test[: arguments.queries]
    recipe = Recipe(lists=arguments.lists)
    with _kept(arguments.directory) as directory:
        found = measure(task, recipe, arguments.plain_lists, queries, directory)
    if arguments.validation or arguments.queries != _TEST:
        return 0
    path = arguments.output / f"{machine.slug(where)}-multi_view_training.json"
    everything = {
        "schema": 1,
        "family": "multi_view_training",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git": machine.commit(),
        "machine": where,
        "versions": machine.versions(),
        "queries": len(queries),
        "training_queries": len(task.training_queries()),
        **found,
    }
    results.write(everything, path)
    print(path)
    for picture in plot.draw(everything, path.stem, path.parent if arguments.output != _RETRIEVAL else plot.PLOTS):
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
