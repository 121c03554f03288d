"""Adding, removing, compacting, ids: any order of changes against a plain array, and FAISS."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from index_model import Model, compare, filled, vectors_of

from embedding_kernels import BinaryIndex
from embedding_kernels.index import binary, searching, segments, storage

DIM = 16
QUERIES = vectors_of(9, DIM, seed=99)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["add", "add with ids", "remove", "compact", "save", "load", "elsewhere"]),
        st.integers(0, 40),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=14,
)


def changed(index: BinaryIndex, model: Model, change: tuple[str, int, int], directory: Path) -> BinaryIndex:
    """Do the same to both."""
    kind, count, seed = change
    draw = np.random.default_rng(seed)
    vectors = vectors_of(count, DIM, seed)
    if kind == "add":
        index.add(vectors)
        model.add(vectors)
    elif kind == "add with ids":
        # a small range, so that ids that were removed come back
        ids = draw.choice(np.setdiff1d(np.arange(200), model.ids), count, replace=False)[: len(vectors)]
        index.add(vectors, torch.from_numpy(ids) if seed % 2 else ids)
        model.add(vectors, ids)
    elif kind == "remove":
        ids = draw.integers(-3, 200, 2 * count)
        assert index.remove_ids(ids) == model.remove(ids)
    elif kind == "compact":
        index.compact()
    elif kind in ("save", "elsewhere"):
        index.save(directory / kind)
    elif (directory / "save").exists():
        index.save(directory / "save")
        shutil.rmtree(directory / "elsewhere", ignore_errors=True)  # which the one loaded does not know
        return BinaryIndex.load(directory / "save", verify=bool(seed % 2))
    return index


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
# a segment of which nothing is left
@example(
    changes=[("add", 20, 0), ("remove", 4, 0), ("compact", 0, 0), ("save", 0, 0), ("remove", 2, 2), ("compact", 0, 0)]
)
def test_any_changes_equal_a_plain_array(monkeypatch: pytest.MonkeyPatch, changes: list[tuple[str, int, int]]) -> None:
    directory = Path(tempfile.mkdtemp())
    index, model = BinaryIndex(DIM), Model(DIM)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "flush", lambda descriptor: None)  # power cuts are not tested here
            patch.setattr(searching, "_BLOCK_BYTES", 40 * 2)  # 40 codes at once
            patch.setattr(segments, "_COPY_BYTES", 16 * 2)
            patch.setattr(segments, "_MERGED_BYTES", 60 * 2)
            patch.setattr(binary, "_QUERY_BLOCK", 5)
            for change in changes:
                index = changed(index, model, change, directory)
                model.check(index, QUERIES)
    finally:
        shutil.rmtree(directory)


@pytest.mark.parametrize("dim", [64, 384])
def test_range_search_equals_faiss(dim: int) -> None:
    faiss = pytest.importorskip("faiss")
    vectors, queries = vectors_of(400, dim), vectors_of(30, dim, seed=1)
    index = BinaryIndex()
    flat = faiss.IndexBinaryFlat(dim)
    for start in range(0, 400, 150):
        index.add(vectors[start : start + 150])
        index._tail = None  # the next rows begin a segment
        flat.add(np.packbits(vectors[start : start + 150] > 0, axis=1))
    for radius in (0, 1, dim // 2, dim + 1):
        lims, distances, ids = index.range_search(queries, radius)
        assert (lims.dtype, distances.dtype, ids.dtype) == (np.int64, np.int32, np.int64)
        theirs = flat.range_search(np.packbits(queries > 0, axis=1), radius)
        compare((lims, distances.astype(np.float32), ids), (theirs[0].astype(np.int64), *theirs[1:]))


def test_range_search_of_nothing() -> None:
    for index in (BinaryIndex(), filled(vectors_of(5, 24))):
        compare(index.range_search(np.zeros((0, 24), np.float32), 5), (np.zeros(1, int), np.empty(0), np.empty(0)))
    lims, distances, ids = BinaryIndex().range_search(torch.zeros(3, 24), 5)
    assert isinstance(lims, torch.Tensor) and lims.tolist() == [0, 0, 0, 0]
    assert (len(distances), len(ids)) == (0, 0)


def test_ids_and_removal_equal_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    vectors, queries = vectors_of(500, 64), vectors_of(30, 64, seed=1)
    ids = np.random.default_rng(0).permutation(2000)[:500]
    index, theirs = BinaryIndex(), faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(64))
    for start in range(0, 500, 170):
        index.add(vectors[start : start + 170], ids[start : start + 170])
        theirs.add_with_ids(np.packbits(vectors[start : start + 170] > 0, axis=1), ids[start : start + 170])
    packed = np.packbits(queries > 0, axis=1)
    compare(index.search(queries, 10), theirs.search(packed, 10))
    gone = np.concatenate((ids[::3], [5000, -1], ids[:5]))
    assert index.remove_ids(gone) == theirs.remove_ids(gone) == len(ids[::3]) + 3
    compare(index.search(queries, 10), theirs.search(packed, 10))
    compare((index.reconstruct([ids[10]]).numpy()[0],), (theirs.reconstruct(int(ids[10])),))


def test_to_and_from_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    vectors, queries = vectors_of(300, 64), vectors_of(20, 64, seed=1)
    index = filled(vectors)
    flat = index.to_faiss()
    assert isinstance(flat, faiss.IndexBinaryFlat)
    assert isinstance(BinaryIndex.from_faiss(flat)._snapshot.segments[0].ids, segments.CountedIds)
    packed = np.packbits(queries > 0, axis=1)
    compare(index.search(queries, 10), flat.search(packed, 10))
    index.remove_ids(np.arange(0, 300, 7))
    index.add(vectors[:20], np.arange(20) * 3 + 1000)
    mapped = index.to_faiss()
    assert isinstance(mapped, faiss.IndexBinaryIDMap2)
    compare(index.search(queries, 10), mapped.search(packed, 10))
    for theirs in (mapped, faiss.deserialize_index_binary(faiss.serialize_index_binary(mapped))):
        back = BinaryIndex.from_faiss(theirs)
        np.testing.assert_array_equal(back.ids, index.ids)
        assert torch.equal(back.codes, index.codes)
    with pytest.raises(ValueError, match="must be an IndexBinaryFlat, or an id map over one, got IndexBinaryHNSW"):
        BinaryIndex.from_faiss(faiss.IndexBinaryHNSW(64, 4))
    with pytest.raises(ValueError, match="FAISS needs a dim that is a multiple of 8, got 13"):
        filled(vectors_of(3, 13)).to_faiss()


@pytest.mark.parametrize("held", range(1, 18))
def test_rows_added_behind_removed_ones(held: int) -> None:
    for count in (1, 3, 8, 20):
        index, model = BinaryIndex(DIM), Model(DIM)
        for target in (index, model):
            target.add(vectors_of(held, DIM))
        assert index.remove_ids([held - 1, 0]) == model.remove(np.array([held - 1, 0]))
        for target in (index, model):
            target.add(vectors_of(count, DIM, seed=1))
        model.check(index, QUERIES)


def test_numbers_are_never_given_twice(tmp_path: Path) -> None:
    vectors = vectors_of(6, DIM)
    index = filled(vectors[:3])
    index.remove_ids([2])
    index.compact()
    index.add(vectors[3:4])
    assert index.ids.tolist() == [0, 1, 3]
    index.add(vectors[4:5], [10])
    index.remove_ids([10, 3])
    index.save(tmp_path / "index")
    index = BinaryIndex.load(tmp_path / "index")
    index.add(vectors[5:])
    assert index.ids.tolist() == [0, 1, 11]
    index.add(vectors[:1], [2**63 - 1])
    assert index.search(vectors[:1], 9, allowed_ids=[2**63 - 1])[1][0, 0] == 2**63 - 1
    with pytest.raises(ValueError, match="the highest one in use leaves no room to count on"):
        index.add(vectors[:1])
    assert len(index) == 4


def test_allowed_ids(tmp_path: Path) -> None:
    vectors, queries = vectors_of(100, DIM), vectors_of(5, DIM, seed=1)
    index = filled(vectors)
    for allowed in ([], [-1, 500], torch.tensor([3, 3, 97]), np.array([7], np.uint8)):
        found = index.search(queries, 4, allowed_ids=allowed)[1]
        expected = sorted({int(i) for i in allowed if 0 <= i < 100})
        assert all(sorted(set(row) - {-1}) == expected for row in found.tolist())
        rescored = index.search(queries, 4, 3, allowed_ids=allowed)[1]
        assert all(sorted(set(row) - {-1}) == expected for row in rescored.tolist())
    index.remove_ids([3])
    assert 3 not in index.search(queries, 4, allowed_ids=[3, 97])[1]


def test_compact_merges_and_frees() -> None:
    vectors = vectors_of(90, DIM)
    index = BinaryIndex(DIM)
    for start in range(0, 90, 30):
        index.add(vectors[start : start + 30])
        index._tail = None
    whole = index._snapshot.segments
    index.compact()
    (merged,) = index._snapshot.segments
    assert (len(merged), merged.ids, merged.alive) == (90, segments.CountedIds(0, 90), None)
    assert len(whole) == 3
    index.remove_ids([4, 80])
    index.compact()
    (merged,) = index._snapshot.segments
    assert (len(merged), merged.alive) == (88, None)
    before = index._snapshot.segments[0]
    index.compact()
    assert index._snapshot.segments[0] is before, "nothing to do, nothing copied"
    index.remove_ids(index.ids)
    index.compact()
    assert (index._snapshot.segments, index.ntotal, index.dim) == ((), 0, DIM)


@pytest.mark.parametrize("where", ["pack_bits", "grown", "replace"])
def test_interrupted_add_adds_nothing(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Wherever it stops, and whatever it was added to, the index is as before and goes on."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target: Any = segments.Tail if where == "grown" else binary
    for ids in (None, np.array([50, 40])):
        index, model = BinaryIndex(DIM), Model(DIM)
        for count in (3, 2):
            vectors = vectors_of(count, DIM, seed=count)
            index.add(vectors)
            model.add(vectors)
            with monkeypatch.context() as patch:
                patch.setattr(target, where, stop)
                with pytest.raises(KeyboardInterrupt):
                    index.add(vectors_of(2, DIM, seed=7), ids)
            model.check(index, QUERIES)
        index.add(vectors[:2], ids)
        model.add(vectors[:2], ids)
        model.check(index, QUERIES)


@pytest.mark.parametrize("ids", [None, np.array([90, 80, 70, 60])])
@pytest.mark.parametrize("removed", [False, True])
def test_a_tail_that_is_not_the_snapshots_is_dropped(ids: np.ndarray | None, removed: bool) -> None:
    """As after an interruption between the two assignments at the end of `add`."""
    index, model = filled(vectors_of(5, DIM)), Model(DIM)
    model.add(vectors_of(5, DIM))
    before = index._snapshot
    index.add(vectors_of(4, DIM, seed=1), ids)
    index._snapshot = before
    if removed:
        assert index.remove_ids([2]) == model.remove(np.array([2]))
    for seed in (2, 3):
        index.add(vectors_of(4, DIM, seed))
        model.add(vectors_of(4, DIM, seed))
        model.check(index, QUERIES)


def test_ids_in_any_order_are_found_without_reading_all() -> None:
    ids = np.random.default_rng(0).permutation(5000)
    index = BinaryIndex(8)
    for start in range(0, 5000, 100):
        index.add(np.zeros((100, 1), np.uint8), ids[start : start + 100])
    tail = index._snapshot.segments[-1].ids
    assert isinstance(tail, segments.TailIds)
    assert len(tail.runs) <= 13
    wanted = np.concatenate((ids, [-5, 5000]))
    rows = np.concatenate((np.arange(5000), [-1, -1]))
    np.testing.assert_array_equal(tail.find(wanted), rows)
    np.testing.assert_array_equal(segments.StoredIds.of(ids).find(wanted), rows)
    ordered = segments.StoredIds.of(np.arange(5000) * 2)
    assert ordered.order is None
    np.testing.assert_array_equal(ordered.find(np.array([0, 1, 9998, 9999, -2])), [0, -1, 4999, -1, -1])
