"""What token prepending gives the vectors of SmolLM2-135M, beside the same prompt without it.

``python bench/token_prepending_retrieval.py``. Every variant of the prompt "means in one word" is read out at several
layers and scored on four tasks: King James verses that look for the same verse of the World English Bible (R@1), human
judgements of the similarity of 50 news texts (Lee et al., 2005) and of 999 pairs of words (SimLex; Spearman's rank
correlation), and WordNet definitions that look for others of the same lexicographer file (NDCG@10). Each figure is
paired with that of the plain prompt at the same layer; the 95 % interval of their difference is a bootstrap over
queries, texts or pairs. Nothing was chosen on these texts: all layers and ranges that were tried stand in the table.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

if __package__ in (None, ""):  # run as a file: its package is the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import machine, plot, results
from bench.paragraph_vector_retrieval import read_wordnet, unit
from bench.ranking import ordered
from embedding_kernels.demo_data import read_bible, smollm2_directory
from embedding_kernels.models import TokenPrependingEmbedder

_SEED, _RESAMPLES = 0, 2000
_RETRIEVAL = results.DIRECTORY / "retrieval"
_EXIT_LAYERS = (10, 15, 20, 25, 28, 30)
Vectors = dict[str, np.ndarray]


class Variant(NamedTuple):
    """One way of prompting: its name, and what `TokenPrependingEmbedder` is told."""

    name: str
    options: dict[str, Any]


_VARIANTS = (
    Variant("PromptEOL", {"prompt": "prompt_eol_plain"}),
    Variant("with <PST>, not copied", {"copy": False}),
    *(
        Variant(f"copied before layers {start + 1} to {stop}", {"start_layer": start, "stop_layer": stop})
        for start, stop in ((1, 3), (1, 5), (1, 7), (4, 7), (7, 10))
    ),
)


# ---- tasks: texts, and from their vectors the measure of a resample ----


class Task(NamedTuple):
    """``prepare(vectors)`` of ``texts`` gives what ``measure(prepared, chosen)`` reads; ``count`` are resampled."""

    name: str
    texts: list[str]
    prepare: Callable[[np.ndarray], Any]
    measure: Callable[[Any, np.ndarray], float]
    count: int


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return unit(left) @ unit(right).T


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    return float(spearmanr(left, right).statistic)


def _mean(values: np.ndarray, chosen: np.ndarray) -> float:
    return float(values[chosen].mean())


def _verses(queries: int, documents: int) -> Task:
    king_james, world_english = (read_bible(f"pythonbible_{name}").verses for name in ("kjv", "web"))
    same = sorted(king_james.keys() & world_english.keys())
    ids = np.random.default_rng(_SEED).permutation(same)[:documents].tolist()
    texts = [king_james[i] for i in ids[:queries]] + [world_english[i] for i in ids]

    def hits(vectors: np.ndarray) -> np.ndarray:
        found = _cosines(vectors[:queries], vectors[queries:]).argmax(1)
        return (found == np.arange(queries)).astype(float)

    return Task("verses, R@1", texts, hits, _mean, queries)


def _gensim_file(name: str) -> Path:
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the similarity sets come with gensim: pip install gensim")
    return Path(spec.origin).parent / "test" / "test_data" / name


def _news() -> Task:
    texts = _gensim_file("lee.cor").read_text(encoding="latin-1").splitlines()
    human = np.loadtxt(_gensim_file("similarities0-1.txt"))

    def measure(cosines: np.ndarray, chosen: np.ndarray) -> float:
        rows, columns = np.triu_indices(len(chosen), 1)
        left, right = chosen[rows], chosen[columns]
        pairs = left != right  # a text drawn twice is no pair with itself
        return _spearman(cosines[left[pairs], right[pairs]], human[left[pairs], right[pairs]])

    return Task("50 news texts, Spearman", texts, lambda vectors: _cosines(vectors, vectors), measure, len(texts))


def _words() -> Task:
    lines = _gensim_file("simlex999.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line and not line.startswith("#")]
    words = sorted({word for pair in pairs for word in pair[:2]})
    places = {word: place for place, word in enumerate(words)}
    left, right = (np.array([places[pair[side]] for pair in pairs]) for side in (0, 1))
    human = np.array([float(pair[2]) for pair in pairs])

    def prepare(vectors: np.ndarray) -> np.ndarray:
        return (unit(vectors[left]) * unit(vectors[right])).sum(1)

    def measure(cosines: np.ndarray, chosen: np.ndarray) -> float:
        return _spearman(cosines[chosen], human[chosen])

    return Task("999 pairs of words, Spearman", words, prepare, measure, len(pairs))


def _definitions(count: int) -> Task:
    split = read_wordnet(count)
    relevant = split.categories[:, None] == split.categories
    np.fill_diagonal(relevant, False)
    asked = relevant.any(1).nonzero()[0]

    def gains(vectors: np.ndarray) -> np.ndarray:
        cosines = _cosines(vectors, vectors)
        np.fill_diagonal(cosines, -np.inf)  # last, and never relevant
        order = np.argsort(-cosines[asked], axis=1, kind="stable")
        return ordered(np.take_along_axis(relevant[asked], order, 1))[1]

    return Task("definitions, NDCG@10", split.held_out, gains, _mean, len(asked))


# ---- the table ----


def _difference(task: Task, ours: Any, plain: Any) -> tuple[float, float, float]:
    """Difference on the whole task, and its 95 % interval."""
    draw = np.random.default_rng(_SEED)
    everything = np.arange(task.count)
    drawn = [draw.integers(0, task.count, task.count) for _ in range(_RESAMPLES)]
    found = [task.measure(ours, chosen) - task.measure(plain, chosen) for chosen in drawn]
    low, high = np.quantile(found, [0.025, 0.975])
    return task.measure(ours, everything) - task.measure(plain, everything), float(low), float(high)


def _encode(variant: Variant, layer: int, tasks: list[Task], dtype: torch.dtype) -> list[Any]:
    embedder = TokenPrependingEmbedder.from_pretrained(
        smollm2_directory(), exit_layer=layer, dtype=dtype, **variant.options
    )
    texts = [text for task in tasks for text in task.texts]
    parts = np.split(embedder.encode(texts, show_progress_bar=False), np.cumsum([len(t.texts) for t in tasks])[:-1])
    return [task.prepare(part) for task, part in zip(tasks, parts, strict=True)]


def _rows(layer: int, tasks: list[Task], dtype: torch.dtype, bar: Any) -> list[dict[str, Any]]:
    """Every variant read out at one layer."""
    rows: list[dict[str, Any]] = []
    plain: list[Any] = []
    for variant in _VARIANTS:
        prepared = _encode(variant, layer, tasks, dtype)
        plain = plain or prepared
        scores = {}
        for task, ours, base in zip(tasks, prepared, plain, strict=True):
            more, low, high = _difference(task, ours, base)
            value = task.measure(ours, np.arange(task.count))
            scores[task.name] = {"value": value, "more_than_plain": more, "low": low, "high": high}
        rows.append({"layer": layer, "variant": variant.name, "scores": scores})
        figures = "  ".join(f"{s['value']:.3f} [{s['low']:+.3f} {s['high']:+.3f}]" for s in scores.values())
        tqdm.write(f"{layer:>5}  {variant.name:<28} {figures}")
        bar.update()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, action="append", help="default: all; keeps nothing")
    parser.add_argument("--verses", type=int, default=800)
    parser.add_argument("--definitions", type=int, default=800)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--output", type=Path, default=_RETRIEVAL)
    arguments = parser.parse_args()
    tasks = [_verses(arguments.verses // 2, arguments.verses), _news(), _words(), _definitions(arguments.definitions)]
    print("figures: value [95 % interval of its difference from the plain prompt at that layer]")
    print(f"{'layer':>5}  {'variant':<28} {' | '.join(task.name for task in tasks)}")
    layers = arguments.layer or _EXIT_LAYERS
    rows = []
    with tqdm(total=len(layers) * len(_VARIANTS), file=sys.stderr, leave=False) as bar:
        for layer in layers:
            rows += _rows(layer, tasks, getattr(torch, arguments.dtype), bar)
    if not arguments.layer:
        where = machine.facts(torch.device("cpu"), torch.get_num_threads())
        found = {
            "schema": 1,
            "family": "token_prepending_retrieval",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "git": machine.commit(),
            "machine": where,
            "versions": machine.versions(),
            "model": "SmolLM2-135M-Instruct",
            "dtype": arguments.dtype,
            "texts": {task.name: len(task.texts) for task in tasks},
            "rows": rows,
        }
        path = arguments.output / f"{machine.slug(where)}-token_prepending_retrieval.json"
        results.write(found, path)
        print(path)
        for picture in plot.draw(found, path.stem, path.parent if arguments.output != _RETRIEVAL else plot.PLOTS):
            print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
