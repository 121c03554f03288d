"""The directory of a saved index: round trips, what is written, and every kind of damage."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_model import Model, compare, filled, vectors_of

from embedding_kernels import BinaryIndex
from embedding_kernels.index import binary, layout, searching, segments
from embedding_kernels.index import directory as saved


def saved_index(path: Path) -> BinaryIndex:
    """An index whose directory has every kind of file."""
    index = BinaryIndex(40, rescore_vectors="int8")
    index.add(vectors_of(9, 40), np.arange(9)[::-1])
    index.remove_ids([3])
    index.save(path)
    return index


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in os.listdir(path)}


def part(path: Path, kind: str) -> Path:
    """The one file of a kind."""
    (found,) = path.glob(f"{kind}*")
    return found


@pytest.mark.parametrize(("count", "dim"), [(0, 8), (1, 13), (1000, 384)])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kept", [None, "bfloat16", "int8"])
def test_round_trip(tmp_path: Path, count: int, dim: int, verify: bool, kept: str | None) -> None:
    index = BinaryIndex(dim, rescore_vectors=kept)
    index.add(vectors_of(count, dim))
    queries = vectors_of(5, dim, seed=1)
    expected = [index.search(queries, 4, multiplier) for multiplier in (None, 3)]
    codes = index.codes.clone()
    index.save(tmp_path / "index")
    loaded = BinaryIndex.load(tmp_path / "index", verify=verify)
    for asked in (index, loaded):
        assert (asked.dim, asked.ntotal, asked.rescore_vectors) == (dim, count, kept)
        assert torch.equal(asked.codes, codes)
        for multiplier, answers in zip((None, 3), expected, strict=True):
            compare(asked.search(queries, 4, multiplier), answers)
    assert os.listdir(tmp_path) == ["index"]


def test_files_are_safetensors_with_the_checksums_of_the_manifest(tmp_path: Path) -> None:
    import hashlib

    safetensors = pytest.importorskip("safetensors")
    index = saved_index(tmp_path / "index")
    tensors = {}
    for name, content in contents(tmp_path / "index").items():
        if name.endswith(".safetensors"):
            assert hashlib.sha256(content).hexdigest() in (tmp_path / "index" / saved.MANIFEST).read_text()
            with safetensors.safe_open(tmp_path / "index" / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    segment = index._snapshot.segments[0]
    assert sorted(tensors) == ["alive", "codes", "id_order", "ids", "scale", "vectors"]
    assert torch.equal(tensors["codes"], segment.codes)
    assert torch.equal(tensors["vectors"], segment.vectors)
    assert tensors["ids"].tolist() == list(range(9))[::-1]
    assert tensors["alive"].tolist() == [0b11111011, 0b10000000]
    assert torch.equal(tensors["scale"], index._snapshot.scale)


def test_saving_again_writes_only_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = filled(vectors_of(1000, 64))
    index.save(path)
    first = contents(path)
    index.add(vectors_of(10, 64, seed=1))
    index.save(path)
    second = contents(path)
    assert {name: second.get(name) for name in first if name != saved.MANIFEST} == {
        name: content for name, content in first.items() if name != saved.MANIFEST
    }
    (new,) = set(second) - set(first)
    assert len(second[new]) < 1000
    index.remove_ids([0, 1005])
    index.save(path)
    third = contents(path)
    assert sorted(name[:5] for name in set(third) - set(second)) == ["alive", "alive"]
    index.remove_ids([1])
    index.save(path)
    fourth = contents(path)
    assert len(set(fourth) - set(third)) == len(set(third) - set(fourth)) == 1, "the new mask replaces the old one"
    index.compact()
    assert contents(path) == fourth, "nothing is on the disk before save"
    index.save(path)
    assert sorted(name[:5] for name in contents(path)) == ["lock", "manif", "segme"]
    assert json.loads((path / saved.MANIFEST).read_bytes())["index"]["generation"] == 5
    compare((BinaryIndex.load(path).ids,), (index.ids,))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_saved_is_mapped_and_let_go(tmp_path: Path) -> None:
    index = filled(vectors_of(1000, 384))
    index.save(tmp_path / "index")
    name = str(part(tmp_path / "index", "segment"))
    assert name in Path("/proc/self/maps").read_text()
    before = contents(tmp_path / "index")
    index.add(vectors_of(10, 384))
    index.remove_ids([1])
    assert contents(tmp_path / "index") == before, "changes do not write to the files"
    index.compact()
    assert name not in Path("/proc/self/maps").read_text()
    assert index._snapshot.segments[0].mapped is not None, "what is compacted lies on the disk"


def test_blocks_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = filled(vectors_of(5000, 384))
    index.save(tmp_path / "index")
    loaded = BinaryIndex.load(tmp_path / "index")
    queries = vectors_of(4, 384, seed=1)
    expected = [loaded.search(queries, 3, multiplier) for multiplier in (None, 2)]
    given_back: list[int] = []
    monkeypatch.setattr(
        layout.MappedFile, "_give_back", lambda self, start, stop: given_back.append(stop - start), raising=True
    )
    loaded.search(queries, 3)
    assert not given_back, "an index that fits in a block stays in memory"
    monkeypatch.setattr(searching, "_BLOCK_BYTES", 1000 * 48)
    for multiplier, answers in zip((None, 2), expected, strict=True):
        given_back.clear()
        compare(loaded.search(queries, 3, multiplier), answers)
        assert given_back[:5] == [1000 * 48] * 5
        assert (len(given_back) == 6) == (multiplier is None), "the whole at the end, and rescoring gives back too"
    for call in (lambda: loaded.reconstruct([3]), lambda: loaded.remove_ids([3]), lambda: loaded.ids):
        given_back.clear()
        call()
        assert not given_back
        with monkeypatch.context() as patch:
            patch.setattr(segments, "_LARGE_FILE", 1000)
            call()
        assert given_back == [part(tmp_path / "index", "segment").stat().st_size]


def test_save_without_dim_and_to_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save: the index must have a dim"):
        BinaryIndex().save(tmp_path / "index")
    (tmp_path / "text").write_text("mine")
    with pytest.raises(ValueError, match=r"save: path must be a directory or not exist, got the file .*text"):
        filled(vectors_of(3, 8)).save(tmp_path / "text")
    assert os.listdir(tmp_path) == ["text"]
    assert (tmp_path / "text").read_text() == "mine"


def test_load_of_other_things(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load: there is no directory .*nothing"):
        BinaryIndex.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        BinaryIndex.load(tmp_path)
    (tmp_path / "text").write_text("no index")
    with pytest.raises(ValueError, match=r"must be a directory written by save, got the file .*text"):
        BinaryIndex.load(tmp_path / "text")
    for content, message in (
        ("no index", "is truncated or no manifest of an index"),
        ("[1]", "is truncated or no manifest of an index"),
        ("{}", "is truncated or no manifest of an index"),
        ("[" * 100_000, "is truncated or no manifest of an index"),
    ):
        (tmp_path / saved.MANIFEST).write_text(content)
        with pytest.raises(ValueError, match=message):
            BinaryIndex.load(tmp_path)
    (tmp_path / saved.MANIFEST).write_bytes(saved.encode({"format": "embedding_kernels.BinaryIndex", "version": 3}))
    with pytest.raises(ValueError, match=r"must be of format 'embedding_kernels.BinaryIndex' 2, got .* 3"):
        BinaryIndex.load(tmp_path)


def test_a_manifest_that_lies_with_a_right_checksum(tmp_path: Path) -> None:
    path = tmp_path / "index"
    saved_index(path)
    manifest = path / saved.MANIFEST
    whole = json.loads(manifest.read_bytes())["index"]
    changes = [("dim", 0), ("dim", "40"), ("dim", 48), ("next_id", -1), ("generation", True), ("segments", None)]
    changes += [("rescore_vectors", "int4"), ("rescore_vectors", "float32"), ("scale", {"file": "scale"})]
    entry = whole["segments"][0]
    for field, value in (("rows", 0), ("rows", 8), ("ids", "counted"), ("first_id", 3), ("data", None), ("alive", 1)):
        changes.append(("segments", [{**entry, field: value}]))
    for name in ("../../etc/passwd", "manifest.json", entry["alive"]["file"]):
        changes.append(("segments", [{**entry, "data": {**entry["data"], "file": name}}]))
    for field, value in changes:
        manifest.write_bytes(saved.encode({**whole, field: value}))
        with pytest.raises(ValueError, match=r"load: .*(manifest\.json|segment-\w+|alive-\w+|scale-\w+)"):
            BinaryIndex.load(path)
    manifest.write_bytes(saved.encode(whole))
    assert len(BinaryIndex.load(path)) == 8


@pytest.mark.parametrize("kind", ["segment", "alive", "scale", "manifest"])
def test_missing_truncated_and_altered_files_are_named(tmp_path: Path, kind: str) -> None:
    saved_index(tmp_path / "index")
    path = part(tmp_path / "index", kind)
    content = path.read_bytes()
    path.unlink()
    for verify in (True, False):
        with pytest.raises(ValueError, match=rf"{path.name} is missing"):
            BinaryIndex.load(tmp_path / "index", verify=verify)
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        for verify in (True, False):
            with pytest.raises(ValueError, match=rf"{path.name} (is truncated|has been altered)") as refusal:
                BinaryIndex.load(tmp_path / "index", verify=verify)
            assert "\n" not in str(refusal.value)
    path.write_bytes(content + b" ")
    with pytest.raises(ValueError, match=rf"{path.name} has been altered"):
        BinaryIndex.load(tmp_path / "index", verify=False)
    for place in range(len(content)):
        for bit in (place % 8, (place + 3) % 8):
            altered = bytearray(content)
            altered[place] ^= 1 << bit
            path.write_bytes(altered)
            with pytest.raises(ValueError, match=rf"{path.name} "):
                BinaryIndex.load(tmp_path / "index")
    header = len(content) - (0 if kind == "manifest" else len(content) - 8)
    altered = bytearray(content)
    altered[header // 2] ^= 1
    path.write_bytes(altered)
    with pytest.raises(ValueError, match=rf"{path.name} "):
        BinaryIndex.load(tmp_path / "index", verify=False)
    path.write_bytes(content)
    assert len(BinaryIndex.load(tmp_path / "index")) == 8


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_altered_files_never_give_other_codes(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "index"
    if not path.exists():
        saved_index(path)
    target = path / data.draw(st.sampled_from(sorted(name for name in os.listdir(path) if name != "lock")))
    content = target.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 40)))
    altered = content[:start] + data.draw(st.binary(max_size=40)) + content[end:]
    target.write_bytes(altered)
    try:
        if altered == content:
            assert len(BinaryIndex.load(path)) == 8
        else:
            with pytest.raises(ValueError, match=target.name):
                BinaryIndex.load(path)
    finally:
        target.write_bytes(content)


def test_saved_through_a_link_and_with_usual_rights(tmp_path: Path) -> None:
    index = saved_index(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    index.remove_ids([1])
    index.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(BinaryIndex.load(tmp_path / "real")) == 7
    (tmp_path / "plain").write_bytes(b"")
    usual = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "real").iterdir()} == {usual}


def test_other_files_in_the_directory_stay(tmp_path: Path) -> None:
    path = tmp_path / "index"
    index = saved_index(path)
    left_behind = ["segment-0123456789abcdef.safetensors", "manifest-0123456789abcdef.partial"]
    for name in [*left_behind, "notes.txt", "segment-mine.safetensors"]:
        (path / name).write_text("mine")
    index.save(path)
    names = os.listdir(path)
    assert not set(left_behind) & set(names)
    assert {"notes.txt", "segment-mine.safetensors"} <= set(names)


def test_a_directory_taken_away_is_written_anew(tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "index"
    index = saved_index(path)
    codes = index.codes.clone()
    shutil.rmtree(path)
    index.save(path)
    assert torch.equal(BinaryIndex.load(path).codes, codes)


def test_many_small_saves_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "_MOST_SMALL", 8)
    index, model = BinaryIndex(16), Model(16)
    counts = []
    for seed in range(30):
        index.add(vectors_of(3, 16, seed))
        model.add(vectors_of(3, 16, seed))
        index.save(tmp_path / "index")
        counts.append(len(list((tmp_path / "index").glob("segment-*"))))
    assert max(counts) == 8
    model.check(BinaryIndex.load(tmp_path / "index"), vectors_of(5, 16))


def test_save_over_a_damaged_index_is_refused(tmp_path: Path) -> None:
    index = saved_index(tmp_path / "index")
    (tmp_path / "index" / saved.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"save: .*manifest\.json is truncated or no manifest"):
        index.save(tmp_path / "index")
    assert len(list((tmp_path / "index").glob("segment-*"))) == 1
