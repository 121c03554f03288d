"""`BinaryIndex` against FAISS; what it accepts and refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from index_model import NO_DISTANCE, NO_INDEX, compare, filled, vectors_of

from embedding_kernels import BinaryIndex
from embedding_kernels.index import binary, searching


@pytest.mark.parametrize("dim", [8, 64, 384, 1000])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (500, 1), (500, 10), (7, 20), (0, 3)])
def test_equals_faiss(dim: int, count: int, k: int) -> None:
    faiss = pytest.importorskip("faiss")
    vectors, queries = vectors_of(count, dim), vectors_of(40, dim, seed=1)
    index = BinaryIndex(dim)
    index.add(vectors)
    flat = faiss.IndexBinaryFlat(dim)
    flat.add(np.packbits(vectors > 0, axis=1))
    packed = np.packbits(queries > 0, axis=1)
    expected = flat.search(packed, k)
    for given_queries in (queries, packed):
        distances, indices = index.search(given_queries, k)
        assert (distances.dtype, indices.dtype) == (np.int32, np.int64)
        np.testing.assert_array_equal(distances, expected[0])
        np.testing.assert_array_equal(indices, expected[1])


def test_prefix_equals_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    vectors, queries = vectors_of(300, 256), vectors_of(20, 256, seed=1)
    index = filled(vectors)
    for width in (8, 64, 200, 256):
        flat = faiss.IndexBinaryFlat(width)
        flat.add(np.packbits(vectors[:, :width] > 0, axis=1))
        expected = flat.search(np.packbits(queries[:, :width] > 0, axis=1), 10)
        packed = np.packbits(queries > 0, axis=1)
        for given_queries in (queries, queries[:, :width], packed, packed[:, : width // 8]):
            distances, indices = index.search(given_queries, 10, truncate_dim=width)
            np.testing.assert_array_equal(distances, expected[0])
            np.testing.assert_array_equal(indices, expected[1])


def test_arrays_in_arrays_out() -> None:
    vectors, queries = vectors_of(50, 24), vectors_of(6, 24, seed=1)
    index = filled(vectors)
    expected = index.search(queries, 5)
    rescored = index.search(queries, 5, 2)
    tensor = torch.from_numpy(queries).requires_grad_()
    for got, wanted in ((index.search(tensor, 5), expected), (index.search(tensor, 5, 2), rescored)):
        assert all(isinstance(part, torch.Tensor) and not part.requires_grad for part in got)
        np.testing.assert_array_equal(got[1].numpy(), wanted[1])
        np.testing.assert_array_equal(got[0].numpy(), wanted[0])
    for dtype in (np.float16, np.float64):
        np.testing.assert_array_equal(index.search(queries.astype(dtype), 5)[1], expected[1])
    np.testing.assert_array_equal(index.search(tensor.detach().bfloat16(), 5)[1].numpy(), expected[1])


def test_any_memory_layout_and_nothing_is_changed() -> None:
    vectors = vectors_of(40, 24)
    queries = vectors_of(6, 24, seed=1)
    expected = filled(vectors).search(queries, 5, 2)
    wide = np.zeros((80, 48), np.float32)
    wide[::2, ::2] = vectors
    frozen = vectors.copy()
    frozen.flags.writeable = False
    for given_vectors in (wide[::2, ::2], vectors[::-1].copy()[::-1], np.asfortranarray(vectors), frozen):
        before = given_vectors.copy()
        index = filled(given_vectors)
        got = index.search(queries[::-1].copy()[::-1], 5, 2)
        np.testing.assert_array_equal(got[1], expected[1])
        np.testing.assert_array_equal(given_vectors, before)
    codes = np.packbits(vectors > 0, axis=1)
    index = filled(codes)
    codes[:] = 255
    np.testing.assert_array_equal(index.search(queries, 5, 2)[1], expected[1])


def test_tiny_float64_is_positive() -> None:
    assert filled(np.array([[1e-300, -1e-300]])).codes.tolist() == [[0b10000000]]


def test_growth_is_amortised() -> None:
    vectors = vectors_of(3000, 16)
    index, copies = BinaryIndex(16), 0
    for start in range(0, 3000, 3):
        before = index.codes.data_ptr()
        index.add(vectors[start : start + 3])
        copies += index.codes.data_ptr() != before
    assert copies < 40
    assert len(index) == index.ntotal == 3000
    np.testing.assert_array_equal(index.codes.numpy(), np.packbits(vectors > 0, axis=1))


def test_interrupted_add_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled(vectors_of(10, 16))
    kept = index.codes.clone()
    monkeypatch.setattr(binary, "_ADD_BLOCK", 4)
    calls: list[int] = []

    def failing(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return torch.zeros(len(tensor), 2, dtype=torch.uint8)

    monkeypatch.setattr(binary, "pack_bits", failing)
    with pytest.raises(KeyboardInterrupt):
        index.add(vectors_of(10, 16))
    assert torch.equal(index.codes, kept)


def test_empty_index() -> None:
    index = BinaryIndex()
    assert (len(index), index.dim) == (0, None)
    distances, indices = index.search(vectors_of(3, 24), 2)
    assert (distances == NO_DISTANCE).all()
    assert (indices == NO_INDEX).all()
    scores, indices = index.search(vectors_of(3, 24), 2, 2)
    assert (scores == -np.inf).all()
    assert (indices == NO_INDEX).all()
    assert index.search(np.zeros((0, 24), np.float32), 2)[0].shape == (0, 2)
    assert filled(vectors_of(5, 24)).search(np.zeros((0, 24), np.float32), 2, 2)[1].shape == (0, 2)
    assert index.dim is None


def test_repr() -> None:
    assert repr(filled(vectors_of(10, 20))) == "BinaryIndex(dim=20, ntotal=10, bytes=30, device=cpu)"


FLOATS = np.zeros((2, 16), np.float32)
CODES = np.zeros((2, 2), np.uint8)
BAD_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("add", {"vectors": [[1.0]]}, "add: vectors must be a NumPy array or a tensor, got list"),
    ("add", {"vectors": FLOATS[0]}, r"add: vectors must have 2 dimensions, got shape \[16\]"),
    ("add", {"vectors": FLOATS[:, :15]}, r"add: vectors must be vectors of 16 dimensions, got shape \[2, 15\]"),
    ("add", {"vectors": CODES[:, :1]}, r"add: vectors must be codes of 2 bytes, got shape \[2, 1\]"),
    ("add", {"vectors": CODES.astype(np.int8)}, "float vectors or uint8 codes, got int8"),
    ("add", {"vectors": torch.zeros(2, 16, dtype=torch.int64)}, "got int64"),
    ("add", {"vectors": FLOATS.astype(object)}, "got object"),
    ("search", {"queries": FLOATS[:, :15], "k": 1}, "search: queries must be vectors of 16 dimensions"),
    ("search", {"queries": FLOATS, "k": 0}, "search: k must be an integer of at least 1, got 0"),
    ("search", {"queries": FLOATS, "k": 2.0}, "search: k must be"),
    ("search", {"queries": FLOATS, "k": 1, "rescore_multiplier": 0}, "rescore_multiplier must be"),
    ("search", {"queries": CODES, "k": 1, "rescore_multiplier": 2}, "must be float vectors to be rescored"),
    (
        "search",
        {"queries": FLOATS, "k": 1, "truncate_dim": 12},
        "truncate_dim must be a multiple of 8 up to 16, got 12",
    ),
    (
        "search",
        {"queries": FLOATS, "k": 1, "truncate_dim": 24},
        "truncate_dim must be a multiple of 8 up to 16, got 24",
    ),
    ("search", {"queries": FLOATS[:, :9], "k": 1, "truncate_dim": 8}, "queries must be vectors of 8 dimensions"),
]


BAD_CALLS += [
    ("add", {"vectors": FLOATS, "ids": [1]}, "add: ids must be one for each of the 2 vectors, got 1"),
    ("add", {"vectors": FLOATS, "ids": [[5, 6]]}, r"add: ids must have 1 dimension, got shape \[1, 2\]"),
    ("add", {"vectors": FLOATS, "ids": [5.0, 6.0]}, "add: ids must be integers, got float64"),
    ("add", {"vectors": FLOATS, "ids": [True, False]}, "add: ids must be integers, got bool"),
    ("add", {"vectors": FLOATS, "ids": ["a", "b"]}, "add: ids must be integers"),
    ("add", {"vectors": FLOATS, "ids": [5, -1]}, r"add: ids must be at least 0 \(-1 marks a missing answer\), got -1"),
    ("add", {"vectors": FLOATS, "ids": [5, 5]}, "add: ids must differ from each other, got 5 twice"),
    ("add", {"vectors": FLOATS, "ids": [5, 1]}, "add: ids must not be in the index .*, got 1"),
    ("add", {"vectors": FLOATS, "ids": np.array([2**63, 5], np.uint64)}, r"ids must be below 2\*\*63"),
    ("remove_ids", {"ids": 3}, r"remove_ids: ids must have 1 dimension, got shape \[\]"),
    ("remove_ids", {"ids": [0.5]}, "remove_ids: ids must be integers"),
    ("remove_ids", {"ids": np.zeros(0)}, "remove_ids: ids must be integers, got float64"),
    ("search", {"queries": FLOATS, "k": 1, "allowed_ids": np.ones(2, bool)}, "allowed_ids must be integers, got bool"),
    ("range_search", {"queries": FLOATS, "radius": -1}, "radius must be an integer of at least 0, got -1"),
    ("range_search", {"queries": FLOATS, "radius": 1.5}, "radius must be an integer of at least 0, got 1.5"),
    ("range_search", {"queries": FLOATS[:, :8], "radius": 1}, "range_search: queries must be vectors of 16 dim"),
    ("reconstruct", {"ids": [0, 7, 8]}, "reconstruct: ids must be in the index, got 7"),
    ("from_faiss", {"index": FLOATS}, "from_faiss: index must be one of FAISS's binary indexes, got ndarray"),
]


@pytest.mark.parametrize(("method", "arguments", "message"), BAD_CALLS, ids=lambda value: str(value)[:30])
def test_bad_calls(method: str, arguments: dict[str, Any], message: str) -> None:
    if method == "from_faiss":
        pytest.importorskip("faiss")
    index = filled(FLOATS)
    with pytest.raises(ValueError, match=message) as refusal:
        getattr(index, method)(**arguments)
    assert "\n" not in str(refusal.value)
    assert index.ids.tolist() == [0, 1]


def test_bad_dims() -> None:
    for dim in (0, -8, 1.5, True):
        with pytest.raises(ValueError, match="dim must be a positive integer"):
            BinaryIndex(dim)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one dimension"):
        BinaryIndex().add(np.zeros((3, 0), np.float32))


def test_without_the_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.numpy", "tqdm", "tqdm.auto", "faiss"):
        monkeypatch.setitem(sys.modules, name, None)
    index = filled(FLOATS)
    assert index.search(FLOATS, 1, show_progress_bar=True)[0].shape == (2, 1)
    index.save(tmp_path / "index")
    assert len(BinaryIndex.load(tmp_path / "index")) == 2
    for call in (index.to_faiss, lambda: BinaryIndex.from_faiss(None)):
        with pytest.raises(ImportError, match=r"faiss: faiss is not installed: pip install faiss-cpu"):
            call()


def test_progress_bar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(binary, "_QUERY_BLOCK", 10)
    monkeypatch.setattr(searching, "_BLOCK_BYTES", 16 * 2)
    index = filled(vectors_of(64, 16))
    for search in (
        lambda show: index.search(vectors_of(30, 16), 2, 2, show_progress_bar=show),
        lambda show: index.range_search(vectors_of(30, 16), 2, show_progress_bar=show),
    ):
        search(False)
        assert capfd.readouterr().err == ""
        search(True)
        assert "12/12" in capfd.readouterr().err, "4 blocks of codes for 3 of queries"


def test_interrupted_search_leaves_the_index_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "_BLOCK_BYTES", 16 * 2)
    index, queries = filled(vectors_of(64, 16)), vectors_of(3, 16, seed=1)
    expected, before = index.search(queries, 5), index._snapshot

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(searching, "hamming_topk", stop)
        with pytest.raises(KeyboardInterrupt):
            index.search(queries, 5, show_progress_bar=True)
    assert index._snapshot is before
    compare(index.search(queries, 5), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kept", [None, "bfloat16", "int8"])
def test_on_a_gpu(tmp_path: Path, kept: str | None) -> None:
    vectors, queries = vectors_of(300, 64), vectors_of(20, 64, seed=1)
    ours, theirs = BinaryIndex(rescore_vectors=kept, device="cuda"), BinaryIndex(rescore_vectors=kept)
    for index in (ours, theirs):
        index.add(vectors[:200], np.arange(200)[::-1])
        index.add(torch.from_numpy(vectors[200:]))
        index.remove_ids([5, 6, 250])
        index.save(tmp_path / index.device.type)
        index.compact()
    loaded = BinaryIndex.load(tmp_path / "cpu", device="cuda")
    for index in (ours, loaded):
        assert index.device.type == index.codes.device.type == "cuda"
        compare(index.search(queries, 5, allowed_ids=range(280)), theirs.search(queries, 5, allowed_ids=range(280)))
        compare(index.range_search(queries, 24), theirs.range_search(queries, 24))
        assert torch.equal(index.reconstruct([1, 290]).cpu(), theirs.reconstruct([1, 290]))
        scores, found = index.search(torch.from_numpy(queries).cuda(), 5, 4)
        assert scores.is_cuda and found.is_cuda
        np.testing.assert_allclose(scores.cpu(), theirs.search(queries, 5, 4)[0], rtol=1e-4, atol=1e-4)
