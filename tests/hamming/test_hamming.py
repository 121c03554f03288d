"""The Hamming family on every backend against its definition; answers are integers, so they are equal or wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedding_kernels as ek
from embedding_kernels import reference
from hamming.made_codes import MAKERS, codes, distances
from operators import assert_same

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# around a word, a vector, and the widths that models give
WIDTHS = (0, 1, 7, 8, 9, 31, 32, 33, 48, 63, 64, 65, 96, 128, 200)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", (0, 1, 7, 8, 9, 63, 64, 65, 130, 384))
def test_pack_bits(backend, device, dtype, dim):
    x = torch.randn(6, dim).to(dtype)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), torch.finfo(dtype).tiny])
    x[0, : min(dim, 6)] = special[: min(dim, 6)].to(dtype)
    packed = ek.pack_bits(x.to(device), backend=backend)
    expected = np.packbits((x.float() > 0).numpy(), axis=1)
    assert_same(packed, torch.from_numpy(expected).reshape(6, (dim + 7) // 8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_pack_bits_of_every_16_bit_pattern_and_of_float32_around_zero(backend, device, dtype):
    if dtype == torch.float32:
        bits = torch.tensor([0, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000])
        patterns = torch.cat([bits, bits - 2**31]).to(torch.int32)
    else:
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = patterns.view(dtype).reshape(8, -1)
    packed = ek.pack_bits(x.to(device), backend=backend)
    assert_same(packed, torch.from_numpy(np.packbits((x.float() > 0).numpy(), axis=1)))


def test_pack_bits_equals_sentence_transformers_ubinary(backend, device):
    st_quantization = pytest.importorskip("sentence_transformers.util.quantization")
    x = torch.randn(50, 384)
    expected = st_quantization.quantize_embeddings(x.numpy(), precision="ubinary")
    assert_same(ek.pack_bits(x.to(device), backend=backend), torch.from_numpy(expected))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("queries", "count"), [(0, 5), (1, 0), (1, 1), (1, 40), (3, 17), (4, 65), (7, 130)])
def test_hamming_distance(backend, device, require_kernel, queries, count, width):
    require_kernel("hamming_distance")
    a, b = codes(queries, width), codes(count, width)
    expected = torch.from_numpy(distances(a, b).astype(np.int32))
    assert_same(ek.hamming_distance(a.to(device), b.to(device), backend=backend), expected)


def brute_force(queries: torch.Tensor, base: torch.Tensor, k: int, allowed=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent of the reference: NumPy's lexicographic sort of (distance, index)."""
    distance = distances(queries, base)
    index = np.arange(len(base))
    if allowed is not None:
        keep = np.unpackbits(allowed.numpy())[: len(base)].astype(bool)
        distance, index = distance[:, keep], index[keep]
    out_distance = np.full((len(queries), k), 2147483647, dtype=np.int32)
    out_index = np.full((len(queries), k), -1, dtype=np.int64)
    for q, row in enumerate(distance):
        order = np.lexsort((index, row))[:k]
        out_distance[q, : len(order)], out_index[q, : len(order)] = row[order], index[order]
    return torch.from_numpy(out_distance), torch.from_numpy(out_index)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("width", (1, 8, 13, 48, 65, 128))
@pytest.mark.parametrize(("queries", "count", "k"), [(1, 1, 1), (1, 70, 10), (3, 70, 71), (5, 40, 1), (9, 150, 20)])
def test_hamming_topk(backend, device, require_kernel, queries, count, k, width, kind):
    require_kernel("hamming_topk")
    base = MAKERS[kind](count, width)
    asked = torch.cat([base[: queries // 2], codes(queries - queries // 2, width)])
    got = ek.hamming_topk(asked.to(device), base.to(device), k, backend=backend)
    assert_same(got, brute_force(asked, base, k))


@pytest.mark.parametrize("share", (0.0, 0.02, 0.5, 1.0))
@pytest.mark.parametrize(("queries", "count", "k"), [(1, 77, 10), (6, 130, 5)])
def test_allowed(backend, device, require_kernel, queries, count, k, share):
    require_kernel("hamming_topk")
    base, asked = codes(count, 16), codes(queries, 16)
    allowed = torch.from_numpy(np.packbits(np.random.default_rng(0).random(count) < share))
    got = ek.hamming_topk(asked.to(device), base.to(device), k, allowed=allowed.to(device), backend=backend)
    assert_same(got, brute_force(asked, base, k, allowed))


def test_width_zero(backend, device, require_kernel):
    require_kernel("hamming_topk")
    distances, indices = ek.hamming_topk(codes(2, 0).to(device), codes(5, 0).to(device), 3, backend=backend)
    assert distances.tolist() == [[0] * 3] * 2
    assert indices.tolist() == [[0, 1, 2]] * 2


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_topk_drawn(data):
    width = data.draw(st.integers(0, 70), "width")
    count, queries = data.draw(st.integers(0, 3000), "count"), data.draw(st.integers(0, 12), "queries")
    k = data.draw(st.integers(1, count + 3), "k")
    make = MAKERS[data.draw(st.sampled_from(sorted(MAKERS)), "kind")]
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    base = make(count, width)
    asked = torch.cat([base[: queries // 3], codes(queries - min(queries // 3, count), width)])
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    assert_same(ek.hamming_topk(asked, base, k, backend="cpu"), brute_force(asked, base, k))


@pytest.mark.parametrize("bits", (8, 24, 128, 384, 520, 1024, 4096))
@pytest.mark.parametrize("kind", MAKERS)
def test_topk_equals_faiss(bits, kind):
    """Distances and the lowest ids, exactly; FAISS orders ties by id."""
    faiss = pytest.importorskip("faiss")
    base = MAKERS[kind](5000, bits // 8).contiguous()
    asked = torch.cat([base[:3], codes(6, bits // 8)])
    index = faiss.IndexBinaryFlat(bits)
    index.add(base.numpy())
    for k in (1, 10, 100, 5003):
        distances, indices = index.search(asked.numpy(), k)
        got = ek.hamming_topk(asked, base, k)
        assert_same(got, (torch.from_numpy(distances), torch.from_numpy(indices)))
        assert_same(ek.hamming_topk(asked[:1], base, k), (got[0][:1], got[1][:1]))


@pytest.mark.slow
def test_a_million_codes_equal_faiss():
    faiss = pytest.importorskip("faiss")
    base, asked = codes(1_000_000, 16), codes(9, 16)
    index = faiss.IndexBinaryFlat(128)
    index.add(base.numpy())
    distances, indices = index.search(asked.numpy(), 20)
    for rows in (slice(0, 1), slice(0, 9)):
        got = ek.hamming_topk(asked[rows], base, 20)
        assert_same(got, (torch.from_numpy(distances[rows]), torch.from_numpy(indices[rows])))


def test_descending_distances_do_not_overflow_the_candidates():
    """Every code is nearer than all before it: the worst case for a buffer of candidates."""
    bits = 256
    steps = torch.arange(bits, -1, -1).repeat_interleave(200)
    base = ek.pack_bits((torch.arange(bits)[None] < steps[:, None]).float())
    query = torch.zeros(1, bits // 8, dtype=torch.uint8)
    for asked in (query, query.expand(5, -1)):
        got = ek.hamming_topk(asked, base, 50)
        assert_same(got, brute_force(asked, base, 50))


def test_prefix_of_the_bits_is_a_view(backend, device, require_kernel):
    require_kernel("hamming_topk")
    base, asked = codes(60, 48).to(device), codes(5, 48).to(device)
    got = ek.hamming_topk(asked[:, :16], base[:, :16], 4, backend=backend)
    assert_same(got, brute_force(asked[:, :16].cpu(), base[:, :16].cpu(), 4))


def test_code_norms_change_nothing(backend, device, require_kernel):
    require_kernel("hamming_topk")
    base, asked = codes(60, 24).to(device), codes(5, 24).to(device)
    norms = reference.hamming.unpack_bits(base).sum(-1, dtype=torch.int32)
    assert_same(
        ek.hamming_topk(asked, base, 6, code_norms=norms, backend=backend),
        ek.hamming_topk(asked, base, 6, backend=backend),
    )


def test_rows_past_two_to_the_31_bytes():
    """Row addresses are 64-bit: two rows three gigabytes apart, of memory that is never touched between them."""
    width, apart = 16, 3 << 30
    storage = torch.from_numpy(np.memmap("/dev/zero", dtype=np.uint8, mode="c", shape=(apart + width,)))
    far = storage.as_strided((2, width), (apart, 1))
    far[1] = 255
    query = torch.full((1, width), 255, dtype=torch.uint8)
    distances, indices = ek.hamming_topk(query, far, 2)
    assert (distances.tolist(), indices.tolist()) == ([[0, 128]], [[1, 0]])
    assert ek.hamming_distance(query.expand(5, -1), far)[0].tolist() == [128, 0]
