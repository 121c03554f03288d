"""`MultiViewRankLLM` beside what of RankLLM runs without vLLM: its data, its writer, its identity reranker."""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("rank_llm")
pytest.importorskip("dacite", reason="rank_llm.data needs dacite")

from rank_llm.data import Candidate, DataWriter, Query, Request

from embedding_kernels.integrations.rank_llm import MultiViewRankLLM
from models.conftest import texts_of

TEXTS = texts_of(12, 20, 3)
SOURCES = Path(importlib.util.find_spec("rank_llm").submodule_search_locations[0]) / "rerank"


@pytest.fixture
def coordinator(reranker) -> MultiViewRankLLM:
    return MultiViewRankLLM(reranker, name="tiny")


def requests_of(*counts: int) -> list[Request]:
    return [
        Request(
            Query(text=("moon", "tree sun")[place % 2], qid=f"q{place}"),
            [Candidate(f"d{at}", 50.0 - at, {"text": TEXTS[at], "lang": "en"}) for at in range(count)],
        )
        for place, count in enumerate(counts)
    ]


def ids(result) -> list:
    return [candidate.docid for candidate in result.candidates]


def scores(result) -> list[float]:
    return [candidate.score for candidate in result.candidates]


def module_of(name: str) -> ModuleType:
    """A module of rank_llm.rerank by itself: the package imports vLLM."""
    spec = importlib.util.spec_from_file_location(f"rank_llm_{name}", SOURCES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_candidates_best_first(coordinator, reranker):
    requests = requests_of(12, 5, 0, 1)
    before = copy.deepcopy(requests)
    results = coordinator.rerank_batch(requests)
    assert requests == before
    for request, result in zip(requests, results, strict=True):
        expected = reranker.rank(request.query.text, [candidate.doc["text"] for candidate in request.candidates])
        assert result.query == request.query
        assert ids(result) == [f"d{one['corpus_id']}" for one in expected]
        assert scores(result) == pytest.approx([one["score"] for one in expected], abs=1e-4)
        assert all(type(score) is float for score in scores(result))
        assert {one.docid: one.doc for one in result.candidates} == {one.docid: one.doc for one in request.candidates}
        assert result.invocations_history == []
    alone = coordinator.rerank(requests[1])
    assert (ids(alone), alone.query) == (ids(results[1]), requests[1].query)
    assert coordinator.rerank_batch([]) == []


@pytest.mark.parametrize(
    ("options", "start", "end"),
    [
        ({"rank_start": 3, "rank_end": 9}, 3, 9),
        ({"rank_end": 4}, 0, 4),
        ({"top_k_retrieve": 7, "window_size": 20}, 0, 7),
        ({"rank_start": 5, "rank_end": 2}, 5, 5),
    ],
)
def test_ranges(coordinator, reranker, options, start, end):
    (request,) = requests_of(12)
    (result,) = coordinator.rerank_batch([request], **options)
    expected = reranker.rank(request.query.text, TEXTS[start:end])
    whole = [f"d{at}" for at in range(12)]
    assert ids(result) == whole[:start] + [f"d{start + one['corpus_id']}" for one in expected] + whole[end:]
    assert scores(result) == scores(request)  # one kind of score, falling: each rank's own


def test_shuffling_changes_the_order_of_equal_scores_alone(coordinator):
    (request,) = requests_of(12)
    (plain,) = coordinator.rerank_batch([request])
    random.seed(1)
    (shuffled,) = coordinator.rerank_batch([request], shuffle_candidates=True)
    assert (ids(shuffled), scores(shuffled)) == (ids(plain), scores(plain))
    (part,) = coordinator.rerank_batch([request], rank_end=6, shuffle_candidates=True)
    assert ids(part)[:6] == ids(coordinator.rerank_batch([request], rank_end=6)[0])[:6]
    assert scores(part) == [1 / rank for rank in range(1, 13)]
    for candidate in request.candidates:
        candidate.doc = {"text": "river"}
    assert ids(coordinator.rerank(request)) == [f"d{at}" for at in range(12)]
    orders = {tuple(ids(coordinator.rerank(request, shuffle_candidates=True))) for _ in range(5)}
    assert len(orders) > 1


def test_texts_and_titles(coordinator, reranker):
    docs = [
        {"contents": TEXTS[0]},
        {"segment": TEXTS[1], "contents": "x", "title": "river stone"},
        {"passage": TEXTS[2], "title": ""},
        {"body": TEXTS[3], "docid": 4},
    ]
    request = Request(Query("moon", 1), [Candidate(at, 1.0, doc) for at, doc in enumerate(docs)])
    passages = [TEXTS[0], {"title": "river stone", "text": TEXTS[1]}, TEXTS[2], TEXTS[3]]
    result = coordinator.rerank(request)
    assert [(one.docid, one.score) for one in result.candidates] == [
        (one["corpus_id"], one["score"]) for one in reranker.rank("moon", passages)
    ]


def test_what_the_writer_writes(coordinator, tmp_path):
    results = coordinator.rerank_batch(requests_of(12, 5), rank_end=8)
    writer = DataWriter(results)
    writer.write_in_trec_eval_format(str(tmp_path / "run.txt"))
    writer.write_in_jsonl_format(str(tmp_path / "run.jsonl"))
    writer.write_inference_invocations_history(str(tmp_path / "history.json"))
    rows = [line.split() for line in (tmp_path / "run.txt").read_text().splitlines()]
    assert [row[2] for row in rows] == [docid for result in results for docid in ids(result)]
    for result in results:  # evaluation goes by the scores
        written = [float(row[4]) for row in rows if row[0] == result.query.qid]
        assert written == sorted(written, reverse=True)
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [one["docid"] for one in lines[1]["candidates"]] == ids(results[1])
    assert [one["invocations_history"] for one in json.loads((tmp_path / "history.json").read_text())] == [[], []]


def test_interface_is_that_of_rank_llm(coordinator):
    """The abstract method, read from its source, and the one class of the package without a language model."""
    tree = ast.parse((SOURCES / "rankllm.py").read_text(encoding="utf-8"))
    (base,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "RankLLM"]
    methods = {node.name: node for node in base.body if isinstance(node, ast.FunctionDef)}
    identity = module_of("identity_reranker").IdentityReranker()
    for name in ("rerank_batch", "get_output_filename"):
        theirs = methods[name].args
        ours = inspect.signature(getattr(MultiViewRankLLM, name)).parameters
        assert list(ours) == [one.arg for one in theirs.args] + [theirs.kwarg.arg]
        defaults = [one.default for one in ours.values() if one.default is not inspect.Parameter.empty]
        assert defaults == [ast.literal_eval(one) for one in theirs.defaults]
        assert hasattr(identity, name)
    requests = requests_of(6, 3)
    for request, ours, theirs in zip(
        requests, coordinator.rerank_batch(requests, rank_end=0), identity.rerank_batch(requests), strict=True
    ):
        assert (ours, ours.candidates) == (theirs, request.candidates)
    assert coordinator.get_name() == "tiny"
    assert coordinator.get_output_filename(100, "dl19", True).startswith("tiny_64_100_dl19_shuffled_20")
    assert coordinator.get_output_filename(100, "", False).startswith("tiny_64_100_20")


def test_loaded_by_name(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "model")
    loaded = MultiViewRankLLM(tmp_path / "model", device="cpu", max_length=64, batch_size=3)
    assert loaded.get_name() == "model"
    assert ids(loaded.rerank_batch(requests_of(12))[0]) == ids(
        MultiViewRankLLM(reranker).rerank_batch(requests_of(12))[0]
    )


def test_bad_input(coordinator, reranker):
    request = Request(Query("moon", 1), [Candidate("d7", 1.0, {"title": "sun", "url": "x"})])
    with pytest.raises(ValueError, match=r"doc of candidate 'd7' must have one of text, .* passage, got title, url"):
        coordinator.rerank(request)
    request.candidates[0].doc = "sun"
    with pytest.raises(ValueError, match="got str"):
        coordinator.rerank(request)
    with pytest.raises(ValueError, match="options are for a model to load, got a MultiViewReranker and dtype"):
        MultiViewRankLLM(reranker, dtype="float32")
