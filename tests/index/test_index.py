"""`BinaryIndex` against FAISS, sentence-transformers, and its own file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding_kernels import BinaryIndex
from embedding_kernels.index import binary as index_module

NO_DISTANCE, NO_INDEX = 2147483647, -1


def vectors_of(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Float vectors with many equal codes, so that ties decide."""
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((max(1, count // 3), dim), dtype=np.float32)
    return centres[draw.integers(len(centres), size=count)] * draw.uniform(0.5, 2, (count, 1)).astype(np.float32)


def filled(vectors: np.ndarray | torch.Tensor) -> BinaryIndex:
    index = BinaryIndex()
    index.add(vectors)
    return index


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


def rescored_by_definition(
    vectors: np.ndarray, queries: np.ndarray, k: int, multiplier: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates by (distance, index), scored by query · bits in float64, ordered by (-score, index)."""
    bits, query_bits = vectors > 0, queries > 0
    scores = np.full((len(queries), k), -np.inf, np.float32)
    indices = np.full((len(queries), k), NO_INDEX)
    for row, query in enumerate(queries):
        distance = (bits != query_bits[row]).sum(axis=1)
        candidates = np.lexsort((np.arange(len(bits)), distance))[: k * multiplier]
        score = (bits[candidates] @ query.astype(np.float64)).astype(np.float32)
        order = np.lexsort((candidates, -score))[:k]
        scores[row, : len(order)], indices[row, : len(order)] = score[order], candidates[order]
    return scores, indices


@pytest.mark.parametrize("dim", [13, 64, 384])
@pytest.mark.parametrize(("count", "k", "multiplier"), [(400, 10, 4), (400, 1, 1), (30, 10, 4), (3, 5, 2), (0, 2, 2)])
def test_rescoring(dim: int, count: int, k: int, multiplier: int) -> None:
    vectors, queries = vectors_of(count, dim), vectors_of(25, dim, seed=1)
    index = BinaryIndex(dim)
    index.add(vectors)
    scores, indices = index.search(queries, k, multiplier)
    expected_scores, expected_indices = rescored_by_definition(vectors, queries, k, multiplier)
    assert (scores.dtype, indices.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_array_equal(np.isinf(scores), np.isinf(expected_scores))
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-6, atol=1e-6)


def test_rescored_ties_go_to_the_lowest_index() -> None:
    # a dimension where the query is 0 changes the distance and not the score, so ties lie at different distances
    queries = np.random.default_rng(0).integers(-1, 2, (25, 24)).astype(np.float32)
    vectors = vectors_of(300, 24)
    scores, indices = filled(vectors).search(queries, 10, 10)
    expected_scores, expected_indices = rescored_by_definition(vectors, queries, 10, 10)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(indices, expected_indices)


def test_rescoring_equals_sentence_transformers() -> None:
    pytest.importorskip("faiss")
    from sentence_transformers.util.quantization import semantic_search_faiss

    # distinct codes: sentence-transformers leaves the order of ties open
    draw = np.random.default_rng(0)
    vectors, queries = (draw.standard_normal((count, 384), dtype=np.float32) for count in (1000, 50))
    packed = np.packbits(vectors > 0, axis=1)
    hits, _ = semantic_search_faiss(queries, packed, corpus_precision="ubinary", top_k=10, rescore_multiplier=4)
    scores, indices = filled(vectors).search(queries, 10, 4)
    np.testing.assert_array_equal(indices, [[hit["corpus_id"] for hit in row] for row in hits])
    np.testing.assert_allclose(scores, [[hit["score"] for hit in row] for row in hits], rtol=1e-6)


def test_rescoring_of_a_prefix_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = vectors_of(200, 64), vectors_of(33, 64, seed=1)
    monkeypatch.setattr(index_module, "_RESCORE_BYTES", 40 * 32 * 8 * 5)  # 5 queries at once
    monkeypatch.setattr(index_module, "_QUERY_BLOCK", 8)
    monkeypatch.setattr(index_module, "_ADD_BLOCK", 16)
    scores, indices = filled(vectors).search(queries, 10, 4, truncate_dim=32)
    expected = rescored_by_definition(vectors[:, :32], queries[:, :32], 10, 4)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(scores, expected[0], rtol=1e-6, atol=1e-6)


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
    monkeypatch.setattr(index_module, "_ADD_BLOCK", 4)
    calls: list[int] = []

    def failing(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return torch.zeros(len(tensor), 2, dtype=torch.uint8)

    monkeypatch.setattr(index_module, "pack_bits", failing)
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


@pytest.mark.parametrize(("method", "arguments", "message"), BAD_CALLS, ids=lambda value: str(value)[:30])
def test_bad_calls(method: str, arguments: dict[str, Any], message: str) -> None:
    index = filled(FLOATS)
    with pytest.raises(ValueError, match=message) as refusal:
        getattr(index, method)(**arguments)
    assert "\n" not in str(refusal.value)
    assert len(index) == 2


def test_bad_dims() -> None:
    for dim in (0, -8, 1.5, True):
        with pytest.raises(ValueError, match="dim must be a positive integer"):
            BinaryIndex(dim)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one dimension"):
        BinaryIndex().add(np.zeros((3, 0), np.float32))


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "dim"), [(0, 8), (1, 13), (1000, 384)])
@pytest.mark.parametrize("verify", [True, False])
def test_round_trip(tmp_path: Path, count: int, dim: int, verify: bool) -> None:
    index = BinaryIndex(dim)
    index.add(vectors_of(count, dim))
    index.save(tmp_path / "codes.index")
    loaded = BinaryIndex.load(tmp_path / "codes.index", verify=verify)
    assert (loaded.dim, loaded.ntotal) == (dim, count)
    assert torch.equal(loaded.codes, index.codes)
    queries = vectors_of(5, dim, seed=1)
    for multiplier in (None, 3):
        for ours, theirs in zip(
            loaded.search(queries, 4, multiplier), index.search(queries, 4, multiplier), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert os.listdir(tmp_path) == ["codes.index"]


def test_load_maps_the_file(tmp_path: Path) -> None:
    filled(vectors_of(1000, 384)).save(tmp_path / "codes.index")
    loaded = BinaryIndex.load(tmp_path / "codes.index", verify=False)
    if sys.platform == "linux":
        assert str(tmp_path / "codes.index") in Path("/proc/self/maps").read_text()
    before = (tmp_path / "codes.index").read_bytes()
    loaded.add(vectors_of(10, 384))
    assert len(loaded) == 1010
    assert (tmp_path / "codes.index").read_bytes() == before, "adding does not write to the file"
    loaded.save(tmp_path / "codes.index")
    assert len(BinaryIndex.load(tmp_path / "codes.index")) == 1010


def test_save_without_dim(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save: the index must have a dim"):
        BinaryIndex().save(tmp_path / "codes.index")
    assert not os.listdir(tmp_path)


def test_load_of_other_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="nothing"):
        BinaryIndex.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        BinaryIndex.load(tmp_path)
    (tmp_path / "text").write_text("no index")
    with pytest.raises(ValueError, match=r"text is truncated or no safetensors file"):
        BinaryIndex.load(tmp_path / "text")
    save_file({"codes": CODES}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"foreign is no index"):
        BinaryIndex.load(tmp_path / "foreign")
    header = {"format": "embedding_kernels.BinaryIndex", "version": "2", "dim": "16", "sha256": ""}
    save_file({"codes": CODES}, tmp_path / "newer", metadata=header)
    with pytest.raises(ValueError, match=r"newer must have format version 1, got '2'"):
        BinaryIndex.load(tmp_path / "newer")


def test_without_the_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("safetensors", "safetensors.numpy", "tqdm", "tqdm.auto"):
        monkeypatch.setitem(sys.modules, name, None)
    index = filled(FLOATS)
    assert index.search(FLOATS, 1, show_progress_bar=True)[0].shape == (2, 1)
    with pytest.raises(ImportError, match=r"pip install .embedding-kernels\[models\]"):
        index.save(tmp_path / "codes.index")
    assert not os.listdir(tmp_path)


def small_file(tmp_path: Path) -> tuple[Path, bytes, torch.Tensor]:
    path = tmp_path / "codes.index"
    index = filled(vectors_of(9, 40))
    index.save(path)
    return path, path.read_bytes(), index.codes


def test_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    path, content, _ = small_file(tmp_path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        for verify in (True, False):
            with pytest.raises(ValueError, match=r"codes\.index") as refusal:
                BinaryIndex.load(path, verify=verify)
            assert "\n" not in str(refusal.value)


def test_every_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    path, content, _ = small_file(tmp_path)
    for place in range(len(content)):
        for bit in range(8):
            altered = bytearray(content)
            altered[place] ^= 1 << bit
            path.write_bytes(altered)
            with pytest.raises(ValueError, match=r"codes\.index"):
                BinaryIndex.load(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_file_never_gives_other_codes(tmp_path: Path, data: st.DataObject) -> None:
    path, content, codes = small_file(tmp_path)
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    path.write_bytes(content[:start] + data.draw(st.binary(max_size=40)) + content[end:])
    try:
        loaded = BinaryIndex.load(path)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = "codes.index" if torch.equal(loaded.codes, codes) else "other codes"
    assert "codes.index" in refusal


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "safetensors.numpy.save_file"])
def test_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failure: BaseException
) -> None:
    path, content, _ = small_file(tmp_path)

    def failing(*arguments: Any, **_: Any) -> None:
        if where == "safetensors.numpy.save_file":
            Path(arguments[1]).write_bytes(b"half a fi")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(where, failing)
        with pytest.raises(type(failure)):
            filled(vectors_of(50, 8)).save(path)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["codes.index"]


_KILLED = """
import sys, numpy as np
from embedding_kernels import BinaryIndex
index = BinaryIndex(4096)
index.add(np.random.default_rng(0).integers(0, 256, (40_000, 512), dtype=np.uint8))
print("ready", flush=True)
while True:
    index.save(sys.argv[1])
"""


def test_killed_save_leaves_a_whole_file(tmp_path: Path) -> None:
    path, content, codes = small_file(tmp_path)
    writer = subprocess.Popen([sys.executable, "-c", _KILLED, path], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    time.sleep(0.13)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    loaded = BinaryIndex.load(path)
    assert len(loaded) in (len(codes), 40_000)
    assert path.read_bytes() == content or loaded.dim == 4096


def test_saved_through_a_link_and_with_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path, _, _ = small_file(tmp_path / "real")
    link = tmp_path / "link.index"
    link.symlink_to(path)
    filled(vectors_of(50, 8)).save(link)
    assert link.is_symlink()
    assert len(BinaryIndex.load(path)) == 50
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode
