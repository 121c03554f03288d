"""`MultiViewReranker`: CrossEncoder's signatures and returns, the order of passages, bad input, files."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding_kernels import MultiViewReranker
from embedding_kernels.models import MultiViewModel

from .conftest import texts_of
from .multi_view import make_reranker, make_t5, make_t5_tokenizer, published_scores

DOCUMENTS = texts_of(40, 50, 5)
QUERY = "moon sunlight"


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reranker():
    return make_reranker()


def test_rank_is_predict_sorted(reranker):
    ranked = reranker.rank(QUERY, DOCUMENTS)
    scores = reranker.predict([(QUERY, document) for document in DOCUMENTS])
    assert scores.dtype == np.float32
    assert scores.shape == (40,)
    assert [result["corpus_id"] for result in ranked] == np.argsort(-scores, kind="stable").tolist()
    assert [result["score"] for result in ranked] == np.sort(scores)[::-1].tolist()
    assert all(set(result) == {"corpus_id", "score"} for result in ranked)
    best = reranker.rank(QUERY, DOCUMENTS, top_k=3, return_documents=True)
    assert best == [{**result, "text": DOCUMENTS[result["corpus_id"]]} for result in ranked[:3]]
    assert reranker.rank(QUERY, DOCUMENTS, top_k=99) == ranked


def test_signatures_are_those_of_cross_encoder():
    import inspect

    sentence_transformers = pytest.importorskip("sentence_transformers")
    for name in ("rank", "predict"):
        theirs = inspect.signature(getattr(sentence_transformers.CrossEncoder, name)).parameters
        ours = inspect.signature(getattr(MultiViewReranker, name)).parameters
        positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == list(theirs)[: len(positional)]
        assert {p.name for p in ours.values() if p.kind is p.KEYWORD_ONLY} <= set(theirs)
    # what their wrappers pass along unset is taken
    unset = {"prompt_name": None, "prompt": None, "device": None, "pool": None, "chunk_size": None}
    assert len(make_reranker().rank("tree", ["sun", "moon"], **unset)) == 2


@pytest.mark.parametrize("seed", range(3))
def test_scores_do_not_depend_on_the_order(reranker, seed):
    documents = [*DOCUMENTS, *DOCUMENTS[:5], "", {"title": "river", "text": DOCUMENTS[7]}]
    expected = reranker.score_batch([QUERY], [documents])[0]
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    got = reranker.score_batch([QUERY], [[documents[place] for place in order]])[0]
    np.testing.assert_array_equal(got, expected[order])
    np.testing.assert_array_equal(expected[40:45], expected[:5])  # equal passages, equal scores


@pytest.mark.parametrize("options", ({"token_budget": 70}, {"token_budget": 1}, {"max_length": 16}))
def test_batches_and_lengths(options):
    base = make_reranker()
    ours = MultiViewReranker(base.model, base.tokenizer, **({"max_length": 64} | options))
    base = MultiViewReranker(base.model, base.tokenizer, max_length=options.get("max_length", 64))
    expected = base.score_batch([QUERY, "tree"], [DOCUMENTS, DOCUMENTS[:3]])
    for batch_size in (None, 1, 7):
        got = ours.score_batch([QUERY, "tree"], [DOCUMENTS, DOCUMENTS[:3]], batch_size=batch_size)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


def test_many_queries_are_scored_one_by_one(reranker):
    queries = ["sun", "moon", "tree", "sun"]
    documents = [DOCUMENTS[:4], [], DOCUMENTS, DOCUMENTS[:4]]
    ranked = reranker.rank_batch(queries, documents)
    for query, held, results in zip(queries, documents, ranked, strict=True):
        alone = reranker.rank(query, held)
        assert [result["corpus_id"] for result in results] == [result["corpus_id"] for result in alone]
        np.testing.assert_allclose([r["score"] for r in results], [r["score"] for r in alone], atol=1e-4)
    pairs = [(query, one) for query, held in zip(queries[:3], documents, strict=False) for one in held]
    shuffled = random.Random(0).sample(pairs, len(pairs))
    scores = dict(zip(((q, d) for q, d in shuffled), reranker.predict(shuffled), strict=True))
    for query, held, expected in zip(queries, documents, reranker.score_batch(queries, documents), strict=True):
        np.testing.assert_allclose([scores[query, one] for one in held], expected, atol=1e-4)


def test_windows_of_passages(reranker, monkeypatch):
    from embedding_kernels.models import multi_view_reranker

    queries, documents = ["sun", "moon", "tree"], [DOCUMENTS[:9], DOCUMENTS[:30], DOCUMENTS[5:8]]
    expected = reranker.score_batch(queries, documents)
    monkeypatch.setattr(multi_view_reranker, "_WINDOW", 10)
    for one, other in zip(reranker.score_batch(queries, documents), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_returns_of_predict(reranker):
    pairs = [("sun", "moon"), ("tree", "river")]
    scores = reranker.predict(pairs)
    assert torch.equal(reranker.predict(pairs, convert_to_tensor=True), torch.from_numpy(scores))
    assert all(isinstance(one, torch.Tensor) for one in reranker.predict(pairs, convert_to_numpy=False))
    np.testing.assert_allclose(
        reranker.predict(pairs, activation_fn=torch.sigmoid), 1 / (1 + np.exp(-scores)), rtol=1e-5
    )
    single = reranker.predict(("sun", "moon"))
    assert np.ndim(single) == 0
    assert single == reranker.predict([("sun", "moon")])[0]
    assert reranker.predict([]).shape == (0,)
    assert reranker.rank("sun", []) == []
    assert reranker.rank_batch([], []) == []
    assert reranker.rank("", [""])[0]["corpus_id"] == 0


def test_input_format(reranker):
    """Sentinels without spaces, query, then title and text; cut behind, with the end token kept."""
    documents = [{"title": "river", "text": "sun"}, {"title": "", "text": "sun"}, {"text": " sun "}, "sun " * 100]
    ids, cu_seqlens, longest, cu_passages = reranker.tokenize(["moon tree"], [documents])
    assert cu_passages.tolist() == [0, 4]
    assert longest == 64
    rows = [ids[start:end].tolist() for start, end in pairwise(cu_seqlens.tolist())]
    words = [reranker.tokenizer.convert_ids_to_tokens(row) for row in rows]
    sentinels = [f"<extra_id_{view}>" for view in range(4)]
    head = [*sentinels, "|", "Query", ":", "moon", "tree", "|", "Context", ":"]
    assert words[0] == [*head, "river", "sun", "</s>"]
    assert words[1] == words[2] == [*head, "sun", "</s>"]
    assert len(words[3]) == 64
    assert words[3][-1] == "</s>"


def test_texts_of_all_kinds(reranker):
    odd = ['"quoted" \\ text', "line\nbreaks\r\n", "emoji 🙂 and 汉字", "sun " * 8000, "", "   ", "<extra_id_0> </s>"]
    ranked = reranker.rank('a "query"\n🙂', odd, return_documents=True)
    assert sorted(result["corpus_id"] for result in ranked) == list(range(7))
    assert all(result["text"] == odd[result["corpus_id"]] for result in ranked)
    assert np.isfinite([result["score"] for result in ranked]).all()


def test_as_published(reranker):
    """Tokens to scores, padded to the maximum."""
    ids, cu_seqlens, _, cu_passages = reranker.tokenize([QUERY], [DOCUMENTS])
    rows = [ids[start:end] for start, end in pairwise(cu_seqlens.tolist())]
    with torch.no_grad():
        expected = published_scores(reranker.model.t5, rows, cu_passages, 4, 64).mean(1)
    np.testing.assert_allclose(reranker.score_batch([QUERY], [DOCUMENTS])[0], expected, atol=2e-4)


# ---- files ----


def test_saved_in_the_published_layout(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "model")
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert "encoder.encoder.block.2.module.layer.0.SelfAttention.q.weight" in names
    assert "encoder.encoder.final_layer_norm.weight" in names
    assert "decoder.block.1.layer.1.EncDecAttention.k.weight" in names
    assert json.loads((tmp_path / "model" / "config.json").read_text())["n_special_tokens"] == 4
    loaded = MultiViewReranker.from_pretrained(tmp_path / "model", max_length=64, device="cpu")
    assert loaded.rank(QUERY, DOCUMENTS) == reranker.rank(QUERY, DOCUMENTS)
    with pytest.raises(FileExistsError):
        reranker.save_pretrained(tmp_path / "model")


def test_views_come_from_the_config_or_the_caller(tmp_path):
    make_reranker(3).save_pretrained(tmp_path / "three")
    assert MultiViewReranker.from_pretrained(tmp_path / "three", device="cpu").model.views == 3
    assert MultiViewReranker.from_pretrained(tmp_path / "three", views=2, device="cpu").model.views == 2
    config = json.loads((tmp_path / "three" / "config.json").read_text())
    del config["n_special_tokens"]
    (tmp_path / "three" / "config.json").write_text(json.dumps(config))
    assert MultiViewReranker.from_pretrained(tmp_path / "three", device="cpu").model.views == 4


def test_a_plain_t5_is_taken_too(tmp_path):
    from transformers import T5ForConditionalGeneration

    tokenizer = make_t5_tokenizer()
    t5 = make_t5(len(tokenizer))
    whole = T5ForConditionalGeneration(t5.config)
    whole.load_state_dict(t5.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    loaded = MultiViewReranker.from_pretrained(tmp_path / "t5", max_length=64, device="cpu")
    assert loaded.rank(QUERY, DOCUMENTS) == make_reranker().rank(QUERY, DOCUMENTS)
    narrow = MultiViewReranker.from_pretrained(tmp_path / "t5", max_length=64, device="cpu", dtype=torch.bfloat16)
    assert narrow.model.t5.dtype == torch.bfloat16
    assert "bfloat16" in repr(narrow)


def test_wrong_and_missing_tensors_are_named(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    gone = "decoder.block.1.layer.1.EncDecAttention.k.weight"
    save_file({name: weight for name, weight in weights.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"every parameter of the model, got none for decoder\.block\.1\.layer\.1"):
        MultiViewReranker.from_pretrained(tmp_path / "model", device="cpu")
    save_file({**weights, gone: torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"EncDecAttention\.k\.weight must be \[64, 64\] by config.json, got \[3, 3\]"):
        MultiViewReranker.from_pretrained(tmp_path / "model", device="cpu")


def test_other_models_and_missing_files(tmp_path):
    from .conftest import save_bert

    with pytest.raises(FileNotFoundError):
        MultiViewReranker.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="model type must be 't5', got 'bert'"):
        MultiViewReranker.from_pretrained(save_bert(tmp_path / "bert"))
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.bfloat16, got torch.float16"):
        MultiViewReranker.from_pretrained(tmp_path, dtype=torch.float16)


# ---- bad input ----

BAD_CALLS = {
    "queries must be as many as the lists of documents, got 2 queries and 1 lists": lambda r: r.score_batch(
        ["a", "b"], [["c"]]
    ),
    "queries must be as many as the lists of documents, got a string": lambda r: r.score_batch("ab", [["c"], ["d"]]),
    "query must be a string, got int": lambda r: r.rank(3, ["a"]),
    "documents must be a sequence of passages, got str": lambda r: r.rank("a", "text"),
    'a document must be a string or a mapping with strings "text"': lambda r: r.rank("a", [{"title": "x"}]),
    "got NoneType": lambda r: r.rank("a", ["b", None]),
    "top_k must be a positive integer or None, got 0": lambda r: r.rank("a", ["b"], top_k=0),
    "batch_size must be a positive integer or None, got 0": lambda r: r.rank("a", ["b"], batch_size=0),
    r"inputs must be \(query, passage\) pairs, got 'abc' in place 0": lambda r: r.predict(["abc"]),
    r"inputs must be \(query, passage\) pairs, got str": lambda r: r.predict("abc"),
    "got a query of type int in place 1": lambda r: r.predict([("a", "b"), (1, "b")]),
    "arguments must be those of its signature, got apply_softmax": lambda r: r.predict(
        [("a", "b")], apply_softmax=True
    ),
    "arguments must be those of its signature, got bach_size": lambda r: r.rank("a", ["b"], bach_size=3),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input(reranker, message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](reranker)


def test_bad_options():
    tokenizer = make_t5_tokenizer()
    model = MultiViewModel(make_t5(len(tokenizer)))
    with pytest.raises(ValueError, match=r"max_length must be more than the views \(4\), got 4"):
        MultiViewReranker(model, tokenizer, max_length=4)
    with pytest.raises(ValueError, match="token_budget must be at least 1, got 0"):
        MultiViewReranker(model, tokenizer, token_budget=0)
    with pytest.raises(ValueError, match=r"tokenizer must have the sentinels .*<extra_id_8>.* as one token each"):
        MultiViewReranker(MultiViewModel(make_t5(len(tokenizer)), 9), tokenizer)


def test_a_failed_call_leaves_no_state(reranker, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(reranker.model, "anchors", fail)
    with pytest.raises(ZeroDivisionError):
        reranker.rank(QUERY, DOCUMENTS)
    assert not torch.is_inference_mode_enabled()
