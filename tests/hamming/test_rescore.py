"""rescore_topk on every backend: scores under the error rule; order, ties and what is absent exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedding_kernels as ek
from embedding_kernels import reference
from embedding_kernels.ops._registry import OPERATORS
from error_rule import assert_within_rule
from operators import assert_same

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "bits": torch.uint8,
}
INF, NAN = float("inf"), float("nan")


def bits_of(codes: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(codes.numpy(), axis=1)[:, :dim])


class Case:
    """Queries, vectors of a kind and what the vectors stand for in float64."""

    def __init__(self, kind: str, queries: int, count: int, dim: int, dtype=torch.float32, whole=False):
        self.queries = (torch.randint(-3, 4, (queries, dim)) if whole else torch.randn(queries, dim)).to(dtype)
        self.scale = None
        if kind == "bits":
            self.vectors = torch.randint(0, 256, (count, (dim + 7) // 8), dtype=torch.uint8)
            self.values = bits_of(self.vectors, dim).double()
        elif kind == "int8":
            self.vectors = torch.randint(-3 if whole else -128, 4 if whole else 128, (count, dim)).to(torch.int8)
            self.scale = 2.0 ** torch.randint(-1, 3, (dim,)) if whole else torch.rand(dim) / 100
            self.values = self.vectors.double() * self.scale.double()
        else:
            self.vectors = (torch.randint(-3, 4, (count, dim)) if whole else torch.randn(count, dim)).to(KINDS[kind])
            self.values = self.vectors.double()

    def run(self, candidates, k, backend, device):
        moved = [tensor.to(device) for tensor in (self.queries, candidates, self.vectors)]
        scale = None if self.scale is None else self.scale.to(device)
        scores, indices = ek.rescore_topk(*moved, k, scale=scale, backend=backend)
        return scores.cpu(), indices.cpu()

    def scores(self, indices: torch.Tensor, dtype=torch.float64, absolute=False) -> torch.Tensor:
        """Inner products of each query with the rows ``indices [queries, n]``, computed in ``dtype``."""
        queries, rows = self.queries.to(dtype), self.values.to(dtype)[indices]
        if absolute:
            queries, rows = queries.abs(), rows.abs()
        return torch.einsum("qd,qnd->qn", queries, rows)


def brute_force(case: Case, candidates: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent of the reference: NumPy's lexicographic sort of (-score, index) in float64."""
    scores = np.full((len(candidates), k), -np.inf, dtype=np.float32)
    indices = np.full((len(candidates), k), -1, dtype=np.int64)
    for q, row in enumerate(candidates.numpy()):
        present = row[row >= 0]
        found = case.values.numpy()[present] @ case.queries[q].double().numpy()
        order = np.lexsort((present, -found))[:k]
        scores[q, : len(order)], indices[q, : len(order)] = found[order], present[order]
    return torch.from_numpy(scores), torch.from_numpy(indices)


def distinct(queries: int, count: int, size: int) -> torch.Tensor:
    return torch.stack([torch.randperm(count)[:size] for _ in range(queries)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", (1, 7, 40, 130, 384, 1000))
def test_scores(backend, device, require_kernel, dim, dtype, kind):
    require_kernel("rescore_topk")
    case = Case(kind, 3, 60, dim, dtype)
    candidates = distinct(3, 60, 37)
    scores, indices = case.run(candidates, 37, backend, device)
    assert_same(indices.sort(1).values, candidates.sort(1).values)
    assert bool((scores[:, 1:] <= scores[:, :-1]).all())
    exact, magnitude = case.scores(indices), case.scores(indices, absolute=True)
    assert_within_rule(scores, exact, case.scores(indices, torch.float32), magnitude)
    # fewer are the first of them, to the bit
    assert_same(case.run(candidates, 5, backend, device), (scores[:, :5], indices[:, :5]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "count", "k"), [(1, 9, 4), (3, 40, 40), (20, 300, 10), (130, 70, 90), (384, 30, 1)])
@pytest.mark.parametrize("queries", (1, 5))
def test_whole_numbers_are_exact(backend, device, require_kernel, queries, dim, count, k, kind):
    """Sums that no order of addition rounds: bit for bit, with ties, candidates that repeat and absent ones."""
    require_kernel("rescore_topk")
    case = Case(kind, queries, count, dim, whole=True)
    candidates = torch.randint(-1, count, (queries, 61))
    got = case.run(candidates, k, backend, device)
    assert_same(got, brute_force(case, candidates, k))
    assert_same(got, reference.rescore_topk(case.queries, candidates, case.vectors, k, scale=case.scale))


def test_ties_go_to_the_lowest_index(backend, device, require_kernel):
    require_kernel("rescore_topk")
    case = Case("float32", 2, 50, 16)
    case.vectors = case.vectors[:1].expand(50, 16)
    candidates = distinct(2, 50, 50)
    scores, indices = case.run(candidates, 50, backend, device)
    assert indices.tolist() == [list(range(50))] * 2
    assert len(set(scores[0].tolist())) == 1


def test_zeros_of_either_sign_tie(backend, device, require_kernel):
    require_kernel("rescore_topk")
    vectors = torch.tensor([[-0.0], [0.0], [-0.0], [1.0]])
    candidates = torch.tensor([[2, 1, 0, 3]])
    _, indices = ek.rescore_topk(
        torch.ones(1, 1, device=device), candidates.to(device), vectors.to(device), 4, backend=backend
    )
    assert indices.tolist() == [[3, 0, 1, 2]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nan(backend, device, require_kernel, dtype):
    """A score that is not a number stands where -inf would, before what is absent."""
    require_kernel("rescore_topk")
    vectors = torch.tensor([[1.0], [NAN], [-INF], [INF], [-1.0], [NAN], [-INF]]).repeat(1, 20)
    queries = torch.ones(2, 20)
    queries[1, 3] = NAN
    candidates = torch.tensor([[-1, 6, 5, 4, 3, 2, 1, 0]] * 2)
    got = ek.rescore_topk(
        queries.to(dtype).to(device), candidates.to(device), vectors.to(dtype).to(device), 9, backend=backend
    )
    scores = torch.tensor([[INF, 20, -20, NAN, -INF, NAN, -INF, -INF, -INF], [NAN] * 7 + [-INF] * 2])
    assert_same(got, (scores, torch.tensor([[3, 0, 4, 1, 2, 5, 6, -1, -1], [0, 1, 2, 3, 4, 5, 6, -1, -1]])))


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy's, in triton's interpreter
def test_infinite_queries_against_int8(backend, device, require_kernel):
    require_kernel("rescore_topk")
    queries = torch.tensor([[INF, 1.0]], device=device)
    vectors = torch.tensor([[1, 1], [-1, 1], [0, 1]], dtype=torch.int8, device=device)
    scale = torch.tensor([1.0, 2.0], device=device)
    got = ek.rescore_topk(queries, torch.tensor([[0, 1, 2]], device=device), vectors, 3, scale=scale, backend=backend)
    assert_same(got, (torch.tensor([[INF, -INF, NAN]]), torch.tensor([[0, 1, 2]])))


def test_a_bit_of_0_keeps_infinities_out(backend, device, require_kernel):
    require_kernel("rescore_topk")
    queries = torch.ones(3, 11)
    queries[0, 2], queries[1, 9], queries[2, 10] = INF, NAN, -INF
    vectors = torch.tensor([[0b11011111, 0b10011111], [0b00100000, 0b01100000], [255, 0]], dtype=torch.uint8)
    candidates = torch.tensor([[0, 1, 2]] * 3)
    got = ek.rescore_topk(queries.to(device), candidates.to(device), vectors.to(device), 3, backend=backend)
    scores = torch.tensor([[INF, INF, 8], [8, 8, NAN], [8, 8, -INF]])
    # the last five bits of a row are past the dimensions, though they are set
    assert_same(got, (scores, torch.tensor([[1, 2, 0], [0, 2, 1], [0, 2, 1]])))


def test_absent_and_fewer_than_k(backend, device, require_kernel):
    require_kernel("rescore_topk")
    case = Case("float32", 3, 8, 5, whole=True)
    candidates = torch.tensor([[-1, -1, -1], [-7, 2, -(2**63)], [5, -1, 5]])
    got = case.run(candidates, 5, backend, device)
    assert_same(got, brute_force(case, candidates, 5))
    assert got[1].tolist() == [[-1] * 5, [2, -1, -1, -1, -1], [5, 5, -1, -1, -1]]


@pytest.mark.gpu
def test_a_candidate_past_the_last_row_is_passed_over_where_values_are_not_read():
    """On a GPU, that is: the launcher itself, without the checks that read values on a CPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vectors = torch.arange(1, 5, dtype=torch.float32, device=device)[:, None]
    candidates = torch.tensor([[4, 1, 2**62, -1, 3, 2**63 - 1]], device=device)
    scores, indices = OPERATORS["rescore_topk"].triton(torch.ones(1, 1, device=device), candidates, vectors, 4)
    assert scores.tolist() == [[4, 2, -INF, -INF]]
    assert indices.tolist() == [[3, 1, -1, -1]]


@pytest.mark.parametrize(
    ("queries", "candidates", "count", "dim"), [(0, 4, 9, 8), (2, 0, 9, 8), (2, 3, 0, 8), (2, 3, 9, 0)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_empty(backend, device, require_kernel, queries, candidates, count, dim, kind):
    require_kernel("rescore_topk")
    case = Case(kind, queries, count, dim)
    asked = torch.arange(candidates).expand(queries, candidates) if count else torch.full((queries, candidates), -1)
    got = case.run(asked, 2, backend, device)
    assert_same(got, brute_force(case, asked, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_vectors_may_be_strided(backend, device, require_kernel, kind):
    """A prefix of the dimensions is a view; queries and candidates may have any strides."""
    require_kernel("rescore_topk")
    whole, case = Case(kind, 3, 20, 48, whole=True), Case(kind, 3, 20, 24, whole=True)
    case.queries, case.values = whole.queries[:, :24], whole.values[:, :24]
    case.scale = None if whole.scale is None else whole.scale[:24]
    case.vectors = whole.vectors[:, : case.vectors.shape[1]]
    candidates = torch.randint(-1, 20, (9, 3)).T
    columns = torch.zeros(24, 3).copy_(case.queries.T).T
    expected = brute_force(case, candidates, 6)
    for queries in (case.queries, columns):
        case.queries = queries
        assert_same(case.run(candidates, 6, backend, device), expected)


def test_is_sentence_transformers_rescoring(backend, device, require_kernel):
    """float query times unpacked bits, as sentence-transformers' semantic_search_usearch and _faiss rescore."""
    require_kernel("rescore_topk")
    float_queries, corpus = torch.randint(-9, 9, (4, 384)).float(), torch.randn(200, 384)
    codes = ek.pack_bits(corpus)
    _, candidates = ek.hamming_topk(ek.pack_bits(float_queries), codes, 40)
    scores, indices = ek.rescore_topk(
        float_queries.to(device), candidates.to(device), codes.to(device), 10, backend=backend
    )
    unpacked = np.unpackbits(codes.numpy(), axis=-1).astype(int)
    for q in range(4):
        rescored = float_queries[q].numpy() @ unpacked[candidates[q].numpy()].T
        # by falling score, equal ones by index
        order = np.lexsort((candidates[q].numpy(), -rescored))[:10]
        assert indices[q].tolist() == candidates[q][order].tolist()
        assert scores[q].tolist() == rescored[order].tolist()


def test_float64_runs_the_reference():
    case = Case("float32", 2, 30, 16, torch.float64)
    candidates = distinct(2, 30, 30)
    scores, indices = ek.rescore_topk(case.queries, candidates, case.vectors, 30, backend="reference")
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, case.scores(indices), rtol=1e-14, atol=1e-14)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_rescore_drawn(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)), "kind")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    queries, count = data.draw(st.integers(0, 5), "queries"), data.draw(st.integers(1, 60), "count")
    case = Case(kind, queries, count, data.draw(st.integers(0, 150), "dim"), whole=True)
    candidates = torch.randint(-1, count, (queries, data.draw(st.integers(0, 700), "candidates")))
    k = data.draw(st.integers(1, 720), "k")
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    assert_same(case.run(candidates, k, "cpu", "cpu"), brute_force(case, candidates, k))


def good_call() -> dict:
    return {
        "queries": torch.zeros(2, 12),
        "candidates": torch.zeros(2, 3, dtype=torch.int64),
        "vectors": torch.zeros(5, 12),
        "k": 2,
    }


INT8, VECTORS = torch.zeros(5, 12, dtype=torch.int8), "a float32, bfloat16, float16 or int8 tensor"
BAD = {
    "no_candidates_of_a_query": ({"candidates": torch.zeros(3, 3, dtype=torch.int64)}, "candidates", "one row a query"),
    "candidates_of_32_bits": ({"candidates": torch.zeros(2, 3, dtype=torch.int32)}, "candidates", "an int64 tensor"),
    "past_the_last_row": ({"candidates": torch.tensor([[0, 1], [5, 2]])}, "candidates", "below 5 .* got 5"),
    "of_no_rows": ({"vectors": torch.zeros(0, 12)}, "candidates", "below 0 .* got 0"),
    "vectors_of_int32": ({"vectors": torch.zeros(5, 12, dtype=torch.int32)}, "vectors", VECTORS),
    "narrow": ({"vectors": torch.zeros(5, 11)}, "vectors", "of size 12 in dimension 1"),
    "narrow_bits": ({"vectors": torch.zeros(5, 1, dtype=torch.uint8)}, "vectors", "of size 2 .*the bits of queries"),
    "k": ({"k": 0}, "k", "at least 1, got 0"),
    "no_scale": ({"vectors": INT8}, "scale", "given for int8 vectors, got None"),
    "scale_of_floats": ({"scale": torch.ones(12)}, "scale", "None for vectors that are not int8"),
    "short_scale": ({"vectors": INT8, "scale": torch.ones(11)}, "scale", "of size 12"),
    "queries_of_64_bits": ({"queries": torch.zeros(2, 12, dtype=torch.int64)}, "queries", "a float32, bfloat16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(backend, device, require_kernel, case):
    require_kernel("rescore_topk")
    changed, argument, message = BAD[case]
    if device == "cuda" and "below" in message:
        pytest.skip("values are not read on a GPU")
    call = {**good_call(), **changed}
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    with pytest.raises(ValueError, match=f"^rescore_topk: {argument} must be .*{message}"):
        ek.rescore_topk(**moved, backend=backend)
