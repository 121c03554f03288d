"""hamming_range on every backend: answers are integers, so they are equal or wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedding_kernels as ek
from hamming.made_codes import MAKERS, codes, distances
from operators import assert_same


def brute_force(queries: torch.Tensor, base: torch.Tensor, radius: int, allowed=None) -> tuple[torch.Tensor, ...]:
    """Independent of the reference: row by row in NumPy."""
    found = distances(queries, base)
    keep = np.ones(len(base), bool) if allowed is None else np.unpackbits(allowed.numpy())[: len(base)].astype(bool)
    answers = [np.flatnonzero((row < radius) & keep) for row in found]
    offsets = np.cumsum([0, *map(len, answers)])
    near = [row[indices] for row, indices in zip(found, answers, strict=True)]
    return (
        torch.from_numpy(offsets.astype(np.int64)),
        torch.from_numpy(np.concatenate([np.empty(0), *near]).astype(np.int32)),
        torch.from_numpy(np.concatenate([np.empty(0), *answers]).astype(np.int64)),
    )


def run(queries, base, radius, backend, device, allowed=None):
    moved = None if allowed is None else allowed.to(device)
    return ek.hamming_range(queries.to(device), base.to(device), radius, allowed=moved, backend=backend)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("width", (0, 1, 7, 8, 13, 31, 48, 65, 128, 200))
@pytest.mark.parametrize(("queries", "count"), [(1, 1), (1, 70), (3, 300), (9, 150)])
def test_hamming_range(backend, device, require_kernel, queries, count, width, kind):
    require_kernel("hamming_range")
    base = MAKERS[kind](count, width)
    asked = torch.cat([base[: queries // 2], codes(queries - queries // 2, width)])
    radius = 4 * width + 1
    got = run(asked, base, radius, backend, device)
    assert_same(got, brute_force(asked, base, radius))
    # some and not all, or it would prove little
    assert kind != "random" or width < 8 or count < 70 or 0 < got[1].numel() < queries * count


@pytest.mark.parametrize("radius", (0, 1, 63, 64, 65, 128, 129, 130, 1 << 20, 1 << 31, 1 << 40))
def test_radii(backend, device, require_kernel, radius):
    """Strictly nearer: 0 finds nothing, 1 what is equal, more than the bits everything; past 32 bits too."""
    require_kernel("hamming_range")
    base = MAKERS["clustered"](90, 16)
    asked = torch.cat([base[:2], ~base[:1], codes(1, 16)])
    got = run(asked, base, radius, backend, device)
    assert_same(got, brute_force(asked, base, radius))
    if radius in (0, 129):
        assert got[1].numel() == (4 * 90 if radius else 0)


@pytest.mark.parametrize("share", (0.0, 0.02, 0.5, 1.0))
@pytest.mark.parametrize(("queries", "count"), [(1, 77), (6, 600)])
def test_allowed(backend, device, require_kernel, queries, count, share):
    require_kernel("hamming_range")
    base, asked = codes(count, 16), codes(queries, 16)
    allowed = torch.from_numpy(np.packbits(np.random.default_rng(0).random(count) < share))
    for radius in (60, 129):
        got = run(asked, base, radius, backend, device, allowed)
        assert_same(got, brute_force(asked, base, radius, allowed))


def test_bits_of_the_mask_past_the_last_code_are_ignored(backend, device, require_kernel):
    require_kernel("hamming_range")
    base, asked = codes(13, 8), codes(2, 8)
    got = run(asked, base, 65, backend, device, torch.full((2,), 255, dtype=torch.uint8))
    assert got[0].tolist() == [0, 13, 26]


@pytest.mark.parametrize(("queries", "count"), [(0, 5), (3, 0), (0, 0)])
def test_empty(backend, device, require_kernel, queries, count):
    require_kernel("hamming_range")
    got = run(codes(queries, 8), codes(count, 8), 65, backend, device)
    assert_same(got, brute_force(codes(queries, 8), codes(count, 8), 65))
    assert got[0].tolist() == [0] * (queries + 1)


def test_prefix_of_the_bits_is_a_view(backend, device, require_kernel):
    require_kernel("hamming_range")
    base, asked = codes(60, 48), codes(5, 48)
    for width in (16, 13):
        view, query = base.to(device)[:, :width], asked.to(device)[:, :width]
        got = ek.hamming_range(query, view, 4 * width, backend=backend)
        assert_same(got, brute_force(asked[:, :width], base[:, :width], 4 * width))


def test_an_answer_at_both_ends_of_many_spans(backend, device, require_kernel):
    """One query over more codes than a program takes, answers few and far between."""
    require_kernel("hamming_range")
    base, asked = torch.full((6000, 8), 255, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.uint8)
    places = torch.tensor([0, 255, 256, 257, 3071, 3072, 5999])
    base[places] = 0
    offsets, found, indices = run(asked, base, 1, backend, device)
    assert offsets.tolist() == [0, 7]
    assert found.tolist() == [0] * 7
    assert indices.tolist() == places.tolist()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_range_drawn(data):
    width = data.draw(st.integers(0, 70), "width")
    count, queries = data.draw(st.integers(0, 3000), "count"), data.draw(st.integers(0, 12), "queries")
    radius = data.draw(st.integers(0, 8 * width + 2), "radius")
    make = MAKERS[data.draw(st.sampled_from(sorted(MAKERS)), "kind")]
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    base = make(count, width)
    asked = torch.cat([base[: queries // 3], codes(queries - min(queries // 3, count), width)])
    allowed = codes(1, (count + 7) // 8)[0] if data.draw(st.booleans(), "masked") else None
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    got = ek.hamming_range(asked, base, radius, allowed=allowed, backend="cpu")
    assert_same(got, brute_force(asked, base, radius, allowed))


def faiss_range(faiss, base: torch.Tensor, asked: torch.Tensor, radius: int) -> tuple[torch.Tensor, ...]:
    """FAISS's answers, which have no order inside a query, by index."""
    index = faiss.IndexBinaryFlat(8 * base.shape[1])
    index.add(base.numpy())
    offsets, found, indices = index.range_search(asked.numpy(), radius)
    order = np.lexsort((indices, np.repeat(np.arange(len(asked)), np.diff(offsets.astype(np.int64)))))
    whole = found[order].astype(np.int32)
    return torch.from_numpy(offsets.astype(np.int64)), torch.from_numpy(whole), torch.from_numpy(indices[order])


@pytest.mark.parametrize("bits", (8, 24, 128, 384, 520, 1024))
@pytest.mark.parametrize("kind", MAKERS)
def test_range_equals_faiss(bits, kind):
    faiss = pytest.importorskip("faiss")
    base = MAKERS[kind](5000, bits // 8).contiguous()
    asked = torch.cat([base[:3], codes(6, bits // 8)])
    for radius in (1, bits // 8, bits // 2, bits // 2 + 8, bits + 1):
        expected = faiss_range(faiss, base, asked, radius)
        assert_same(ek.hamming_range(asked, base, radius), expected)
        # one query takes another road than several
        single = ek.hamming_range(asked[:1], base, radius)
        assert_same(single, (expected[0][:2], *(values[: expected[0][1]] for values in expected[1:])))


@pytest.mark.parametrize("rows", (1, 5))
def test_range_holds_what_topk_finds(rows):
    """The two searches agree: everything nearer than the last of the top-k, in another order."""
    base, asked = codes(4000, 32), codes(rows, 32)
    nearest, places = ek.hamming_topk(asked, base, 50)
    for query in range(rows):
        radius = int(nearest[query, -1])
        _, found, indices = ek.hamming_range(asked[query : query + 1], base, radius)
        closer = nearest[query] < radius
        order = places[query][closer].argsort()
        assert_same((found, indices), (nearest[query][closer][order], places[query][closer][order]))


BAD = {
    "codes_of_int8": ({"codes": torch.zeros(9, 4, dtype=torch.int8)}, "codes must be a uint8 tensor .*got int8"),
    "one_query": ({"queries": torch.zeros(4, dtype=torch.uint8)}, "queries must be a uint8 tensor"),
    "narrow": ({"codes": torch.zeros(9, 3, dtype=torch.uint8)}, "codes must be of size 4 in dimension 1"),
    "radius": ({"radius": -1}, "radius must be at least 0, got -1"),
    "short_mask": ({"allowed": torch.zeros(1, dtype=torch.uint8)}, "allowed must be of size 2 in dimension 0"),
    "mask_of_bool": ({"allowed": torch.zeros(2, dtype=torch.bool)}, "allowed must be a uint8 tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, device, require_kernel, case):
    require_kernel("hamming_range")
    changed, message = BAD[case]
    call = {"queries": codes(2, 4), "codes": codes(9, 4), "radius": 5, **changed}
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    with pytest.raises(ValueError, match=f"^hamming_range: {message}"):
        ek.hamming_range(**moved, backend=backend)
