"""mteb's own mock tasks, and what the adapter passes on."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

mteb = pytest.importorskip("mteb")
transformers = pytest.importorskip("transformers")

from mteb.mocks import MOCK_TASK_TEST_GRID_MONOLINGUAL  # noqa: E402
from mteb.models.models_protocols import CrossEncoderProtocol, EncoderProtocol  # noqa: E402
from mteb.models.search_wrappers import SearchCrossEncoderWrapper  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from embedding_kernels import Embedder, MultiViewReranker  # noqa: E402
from embedding_kernels.integrations.mteb import MtebEmbedder, MtebReranker  # noqa: E402

TEXTS = ["a test sentence", "another positive sentence", "test", "", "sentence test positive another a"]
TASK = SimpleNamespace(name="SomeSearch", type="Retrieval")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT that knows a few of the mock tasks' words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "this", "is", "a", "test", "sentence"]
    words += ["another", "positive", "negative", "query", "find", ":"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    path = tmp_path_factory.mktemp("mteb") / "tiny"
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


@pytest.fixture
def model(directory: Path) -> MtebEmbedder:
    return MtebEmbedder(directory, device="cpu")


def batches(texts: list[str], size: int = 2) -> Iterator[dict[str, list[str]]]:
    return ({"text": texts[start : start + size]} for start in range(0, len(texts), size))


KINDS = ("Retrieval", "Reranking", "STS", "Classification", "Clustering", "PairClassification", "BitextMining")


@pytest.mark.parametrize("kind", KINDS)
def test_mock_tasks(model: MtebEmbedder, kind: str) -> None:
    tasks = [task for task in MOCK_TASK_TEST_GRID_MONOLINGUAL if task.metadata.type == kind]
    assert tasks
    results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False)
    assert not results.exceptions
    assert len(results.task_results) == len(tasks)
    for result in results.task_results:
        assert 0 <= abs(result.get_score()) <= 1
    assert (results.model_name, results.model_revision) == (model.mteb_model_meta.name, model.mteb_model_meta.revision)


def test_scores_are_those_of_sentence_transformers(directory: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    peer = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    tasks = [task for task in MOCK_TASK_TEST_GRID_MONOLINGUAL if task.metadata.type in ("STS", "Retrieval")]
    ours, theirs = (
        mteb.evaluate(model, tasks, cache=None, show_progress_bar=False).task_results
        for model in (MtebEmbedder(directory, device="cpu"), peer)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert our.get_score() == pytest.approx(their.get_score(), abs=1e-6), our.task_name


def test_metadata(directory: Path, model: MtebEmbedder) -> None:
    assert isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    parameters = list(transformers.BertModel.from_pretrained(directory).parameters())
    assert meta.name == "local/tiny"
    assert meta.n_parameters == sum(weight.numel() for weight in parameters)
    assert meta.n_embedding_parameters == 15 * 32
    assert (meta.embed_dim, meta.max_tokens, meta.use_instructions, meta.loader) == (32, 32, False, None)
    assert meta.similarity_fn_name == "cosine"
    assert meta.framework == ["PyTorch", "Transformers", "safetensors"]
    assert len(meta.revision or "") == 16
    given = MtebEmbedder(
        model.model,
        "v2",
        name="me/mine",
        instructions={"query": "find : "},
        metadata={"languages": ["eng-Latn"], "license": "apache-2.0", "max_tokens": 16},
    ).mteb_model_meta
    assert (given.name, given.revision, given.languages) == ("me/mine", "v2", ["eng-Latn"])
    assert (given.license, given.max_tokens, given.use_instructions) == ("apache-2.0", 16, True)
    assert given.experiment_kwargs == {"instructions": "[('query', 'find : ')]"}
    half = MtebEmbedder(directory, device="cpu", embed_dim=16, dtype=torch.bfloat16).mteb_model_meta
    assert (half.embed_dim, half.output_dtypes) == (16, "bfloat16")
    assert half.experiment_kwargs == {"dtype": "torch.bfloat16", "truncate_dim": "16"}


def test_revision_follows_the_files(directory: Path, tmp_path: Path) -> None:
    def revision(change: Callable[[Path], Any]) -> str | None:
        import shutil

        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(directory, copy)
        change(copy)
        return MtebEmbedder(copy, device="cpu").mteb_model_meta.revision

    same = revision(lambda path: None)
    assert same == MtebEmbedder(directory, device="cpu").mteb_model_meta.revision

    def last_weight(path: Path) -> None:
        file = path / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)

    assert revision(last_weight) != same
    assert revision(lambda path: (path / "config_sentence_transformers.json").write_text("{}")) != same


def test_hub_names(directory: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(directory)
    meta = MtebEmbedder(Embedder.from_pretrained(snapshot, device="cpu")).mteb_model_meta
    assert (meta.name, meta.revision, meta.loader) == ("some/model", "0123abcd", MtebEmbedder)


def test_order_and_kinds_of_text(directory: Path, tmp_path: Path) -> None:
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query : "}}))
    try:
        model = MtebEmbedder(directory, device="cpu")
    finally:
        (directory / "config_sentence_transformers.json").unlink()
    plain = model.encode(batches(TEXTS), task_metadata=TASK, hf_split="test", hf_subset="default", batch_size=3)
    np.testing.assert_allclose(plain, model.model.encode(TEXTS), rtol=1e-5, atol=1e-6)
    assert (plain.dtype, plain.shape) == (np.float32, (5, 32))
    query = model.encode(batches(TEXTS, 3), task_metadata=TASK, prompt_type=PromptType.query)
    np.testing.assert_allclose(query, model.model.encode(TEXTS, prompt="query : "), rtol=1e-5, atol=1e-6)
    document = model.encode(batches(TEXTS, 1), task_metadata=TASK, prompt_type=PromptType.document)
    np.testing.assert_allclose(document, plain, rtol=1e-5, atol=1e-6)
    assert model.mteb_model_meta.use_instructions


@pytest.mark.parametrize(
    ("keys", "winner"),
    [
        (("query", "Retrieval", "SomeSearch", "SomeSearch-query"), "SomeSearch-query"),
        (("query", "Retrieval", "SomeSearch"), "SomeSearch"),
        (("query", "Retrieval-query", "Retrieval"), "Retrieval-query"),
        (("query", "OtherSearch"), "query"),
        (("document",), None),
    ],
)
def test_instructions_by_task(model: MtebEmbedder, keys: tuple[str, ...], winner: str | None) -> None:
    prompts = ["find : ", "query : ", "is this a ", "another : "]
    instructions = dict(zip(keys, prompts, strict=False))
    instructed = MtebEmbedder(model.model, instructions=instructions)
    found = instructed.encode(batches(TEXTS), task_metadata=TASK, prompt_type=PromptType.query)
    expected = model.model.encode(TEXTS, prompt=instructions[winner] if winner else "")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_precisions(model: MtebEmbedder) -> None:
    def encoded(precision: str) -> np.ndarray:
        return model.encode(batches(TEXTS), task_metadata=TASK, precision=precision)

    floats = encoded("float32")
    for precision in ("binary", "ubinary"):
        assert encoded(precision).dtype == np.int8
        np.testing.assert_array_equal(encoded(precision), np.where(floats > 0, 1, -1))
    similarity = np.asarray(model.similarity(encoded("ubinary"), encoded("ubinary")))
    hamming = (floats[:, None] > 0) != (floats[None] > 0)
    np.testing.assert_allclose(similarity, 1 - 2 * hamming.mean(-1), atol=1e-6)
    assert encoded("uint8").dtype == np.uint8


def test_empty_input(model: MtebEmbedder) -> None:
    assert model.encode(iter([]), task_metadata=TASK).shape == (0, 32)
    assert model.encode([{"text": []}], task_metadata=TASK, precision="ubinary").shape == (0, 32)


def test_unknown_options(model: MtebEmbedder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model.encode(batches(TEXTS), task_metadata=TASK, show_progress_bar=False, max_samples=3)
    assert "Passed over, because Embedder.encode has no such arguments: max_samples" in caplog.text
    with pytest.raises(ValueError, match="options are for a model to load, got an Embedder and truncate_dim"):
        MtebEmbedder(model.model, embed_dim=8)
    with pytest.raises(ValueError, match="metadata must have fields of mteb's ModelMeta, got colour"):
        MtebEmbedder(model.model, metadata={"colour": "blue"})


# ---- MtebReranker ----

MOCK_WORDS = ["this", "is", "a", "test", "sentence", "another", "positive", "negative", "query", "document", "corpus"]


@pytest.fixture(scope="module")
def mock_reranker() -> MultiViewReranker:
    """A tiny random reranker that knows a few of the mock tasks' words."""
    from models.multi_view import make_reranker

    return make_reranker(words=MOCK_WORDS)


def mock_tasks(kind: str) -> list[Any]:
    return [copy.deepcopy(task) for task in MOCK_TASK_TEST_GRID_MONOLINGUAL if task.metadata.type == kind]


@pytest.mark.parametrize("kind", ["Reranking", "InstructionReranking"])
def test_reranker_on_mock_tasks(mock_reranker: MultiViewReranker, tmp_path: Path, kind: str) -> None:
    tasks, model = mock_tasks(kind), MtebReranker(mock_reranker)
    assert tasks
    results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False, prediction_folder=tmp_path)
    assert not results.exceptions
    assert len(results.task_results) == len(tasks)
    assert (results.model_name, results.model_revision) == (model.mteb_model_meta.name, model.mteb_model_meta.revision)
    for task, result in zip(tasks, results.task_results, strict=True):
        assert 0 <= result.get_score() <= 1
        predictions = json.loads((tmp_path / task.prediction_file_name).read_text())["default"]["test"]
        task.load_data()
        data = task.dataset["default"]["test"]
        instructions = {one["id"]: f" {one['instruction']}" for one in data["queries"] if "instruction" in one}
        passages = {one["id"]: one for one in data["corpus"]}
        for query in data["queries"]:
            held = data["top_ranked"][query["id"]]
            (scores,) = mock_reranker.score_batch(
                [query["text"] + instructions.get(query["id"], "")], [[passages[document] for document in held]]
            )
            found = [predictions[query["id"]][document] for document in held]
            assert found == pytest.approx(scores.tolist(), abs=1e-4)


def test_reranking_what_an_embedder_found(
    mock_reranker: MultiViewReranker, model: MtebEmbedder, tmp_path: Path
) -> None:
    (task,) = [task for task in mock_tasks("Retrieval") if task.metadata.name == "MockRetrievalTask"]
    mteb.evaluate(model, task, cache=None, show_progress_bar=False, prediction_folder=tmp_path)
    results = mteb.evaluate(
        MtebReranker(mock_reranker), task.convert_to_reranking(tmp_path, top_k=2), cache=None, show_progress_bar=False
    )
    assert not results.exceptions
    assert 0 < results.task_results[0].get_score() <= 1


def test_pairs_are_scored_by_query(mock_reranker: MultiViewReranker) -> None:
    """Two queries of the same text and other candidates are two lists, through mteb's own loaders too."""
    from datasets import Dataset

    model = MtebReranker(mock_reranker)
    texts = [*TEXTS[:3], "negative query", "document"]
    corpus = Dataset.from_list([{"id": f"d{n}", "title": "corpus" * (n == 0), "text": t} for n, t in enumerate(texts)])
    queries = Dataset.from_list([{"id": one, "text": "a query"} for one in ("q0", "q1", "q2")])
    ranked = {"q0": ["d0", "d1", "d3"], "q1": ["d4", "d1"], "q2": []}
    arguments = {"task_metadata": mock_tasks("Reranking")[0].metadata, "hf_split": "test", "hf_subset": "default"}
    search = SearchCrossEncoderWrapper(model)
    search.index(corpus, encode_kwargs={}, **arguments)
    found = search.search(queries, top_k=5, encode_kwargs={"batch_size": 2}, top_ranked=ranked, **arguments)
    passages = {f"d{n}": {"title": "corpus" * (n == 0), "text": text} for n, text in enumerate(texts)}
    for query, held in ranked.items():
        (scores,) = mock_reranker.score_batch(["a query"], [[passages[one] for one in held]])
        assert [found[query][one] for one in held] == pytest.approx(scores.tolist(), abs=1e-4)
    assert found["q0"]["d1"] != pytest.approx(found["q1"]["d1"], abs=1e-4)
    # without ids the text tells queries apart, and batches need not be of one size
    pairs = [("a query", texts[0]), ("test", texts[1]), ("a query", texts[2])]
    scores = model.predict(batches([q for q, _ in pairs], 2), batches([d for _, d in pairs], 1), task_metadata=TASK)
    np.testing.assert_array_equal(scores, mock_reranker.predict(pairs))
    assert (scores.dtype, model.predict([], []).shape) == (np.float32, (0,))


def test_reranker_metadata(mock_reranker: MultiViewReranker, tmp_path: Path) -> None:
    mock_reranker.save_pretrained(tmp_path / "model")
    model = MtebReranker(tmp_path / "model", device="cpu", max_length=32)
    assert isinstance(model, CrossEncoderProtocol)
    assert not isinstance(model, EncoderProtocol)
    meta = model.mteb_model_meta
    weights = {weight.data_ptr(): weight.numel() for weight in mock_reranker.model.t5.parameters()}
    assert meta.is_cross_encoder
    assert (meta.name, len(meta.revision or ""), meta.loader) == ("local/model", 16, None)
    assert (meta.max_tokens, meta.embed_dim, meta.similarity_fn_name) == (32, None, None)
    assert (meta.n_parameters, meta.experiment_kwargs) == (sum(weights.values()), {"max_length": "32"})
    assert meta.n_embedding_parameters == len(mock_reranker.tokenizer) * 64
    assert MtebReranker(mock_reranker).mteb_model_meta.name == "local/unnamed"
    given = MtebReranker(mock_reranker, "v2", name="me/mine", metadata={"license": "mit"}).mteb_model_meta
    assert (given.name, given.revision, given.license) == ("me/mine", "v2", "mit")


def test_reranker_bad_input(mock_reranker: MultiViewReranker, caplog: pytest.LogCaptureFixture) -> None:
    model = MtebReranker(mock_reranker)
    with pytest.raises(ValueError, match="inputs2 must be as many as inputs1, got 1 passages and 2 queries"):
        model.predict(batches(["a", "test"]), batches(["sentence"]))
    with caplog.at_level(logging.WARNING):
        model.predict(batches(["a"]), batches(["test"]), precision="float32", batch_size=4)
    assert "Passed over, because MultiViewReranker.rank has no such arguments: precision" in caplog.text
    with pytest.raises(ValueError, match="MtebReranker: options are for a model to load, got a MultiViewReranker"):
        MtebReranker(mock_reranker, device="cpu")
    with pytest.raises(ValueError, match="MtebReranker: metadata must have fields of mteb's ModelMeta, got colour"):
        MtebReranker(mock_reranker, metadata={"colour": "blue"})
