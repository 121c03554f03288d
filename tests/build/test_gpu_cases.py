"""The benchmarks' cases for a GPU, at a size for a processor: that they build, that answers are right, and that wrong
ones are refused."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedding_kernels import reference

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "bench").exists(), reason="the benchmarks are not in this tree"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """A function that imports a module of the benchmarks."""
    for name in ("numpy", "tqdm"):
        pytest.importorskip(name)
    sys.path.insert(0, str(ROOT))
    yield lambda name: importlib.import_module(f"bench.{name}")
    sys.path.remove(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        del sys.modules[name]


@pytest.fixture
def room(bench):
    return bench("harness").Room(CPU, 1, quick=True, cold_bytes=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Small as they are, threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- all cases ----


@pytest.mark.parametrize("family", ["attention", "hamming"])
def test_every_case_is_built_and_right_at_a_small_size(bench, room, family):
    cases = [case for case in bench("run").cases_for(family, CUDA, quick=False) if case.where == "cuda"]
    assert len(cases) >= 5
    assert len({case.title for case in cases}) == len(cases)
    for case in cases:
        contenders, refused = bench("harness").admit(case.small.build(room))
        assert not refused, case.title
        roles = [contender.role for contender in contenders]
        assert roles[0] == "ours", case.title
        assert set(roles) >= {"ours", "ceiling"}, case.title
        names = {contender.name for contender in contenders if contender.role == "peer"}
        assert names <= set(case.peers), case.title


@pytest.mark.parametrize("family", ["attention", "hamming"])
def test_where_a_case_is_measured(bench, family):
    here, there = (bench("run").cases_for(family, device, quick=False) for device in (CPU, CUDA))
    assert {case.where for case in here} == {"cpu", "both"}
    kinds = [case.where for case in there]
    assert set(kinds) == {"cuda", "both"}
    assert kinds == sorted(kinds, reverse=True)  # "cuda" first
    assert not any(case.levels for case in there)


def test_dry_runs_go_through_one_case_for_a_gpu(bench, monkeypatch, tmp_path):
    gpu_bench, seen = bench("gpu_bench"), []
    monkeypatch.setattr(gpu_bench, "measure_all", lambda cases, *rest: seen.extend(cases) or 0)
    arguments = ["gpu_bench.py", "hamming", "--dry-run", "--device", "cpu", "--file", str(tmp_path / "hamming.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_bench.main() == 0
    first = bench("hamming_gpu").CASES[0].small
    assert [case.quick for case in seen] == [True, False]
    assert seen[1] is first


def test_patient_cases_get_more_of_the_time(bench, room, monkeypatch, tmp_path):
    gpu_bench, harness = bench("gpu_bench"), bench("harness")
    seconds = {}

    def timed(case, contenders, room, protocol):
        seconds[case.title] = protocol.seconds
        return {"op": case.op, "title": case.title}

    monkeypatch.setattr(gpu_bench, "time_case", timed)
    monkeypatch.setattr(gpu_bench, "contenders", lambda case, room: [])
    case = harness.Case("made_up", "slow", {}, (), lambda room: [], harness.Work(1, 1, "things"), patience=3.0)
    cases = [case, replace(case, title="fast", patience=1.0)]
    for name, available, expected in (("much", 1000.0, (6.0, 2.0)), ("little", 8.0, (3.6, 2.0))):
        record = gpu_bench.Record(tmp_path / f"{name}.json", {"family": "made_up"})
        assert gpu_bench.measure_all(cases, room, harness.Protocol(seconds=2.0), available, record) == 0
        assert tuple(seconds.values()) == pytest.approx(expected, abs=0.2)


def test_a_peer_that_cannot_run_ends_only_itself(bench):
    harness = bench("harness")

    def fails(turn):
        raise RuntimeError("No available kernel")

    ours = harness.Contender(harness.OURS, lambda turn: turn, role="ours")
    admitted, refused = harness.admit([ours, harness.Contender("peer", fails)])
    assert admitted == [ours]
    assert refused == {"peer": "RuntimeError: No available kernel"}
    with pytest.raises(RuntimeError, match="No available kernel"):
        harness.admit([replace(ours, call=fails)])


# ---- what a contender runs within ----


def test_a_context_is_entered_around_a_sample(bench, room):
    inside = []

    @contextmanager
    def context():
        inside.append("in")
        yield
        inside.append("out")

    contender = bench("within").Within("peer", inside.append, None, context)
    contender.check()
    assert contender.timed(2, 7, room) >= 0
    assert inside == ["in", 0, "out", "in", 7, 8, "out"]
    assert contender.role == "peer"


@pytest.mark.parametrize("before", [None, "all"])
def test_other_roads_are_taken_by_the_variable(bench, room, monkeypatch, before):
    within, name, seen = bench("within"), "EMBEDDING_KERNELS_HOPPER", []
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    ours = within.Contender("ours", lambda turn: seen.append(os.environ[name]), role="ours")
    assert within.other_roads(ours, tuple(within.ROADS), room) == []
    monkeypatch.setattr(within, "has_roads", lambda room: True)
    for contender in within.other_roads(ours, tuple(within.ROADS), room):
        contender.check()
    assert seen == ["none", "all"]
    assert os.environ.get(name) == before
    assert len(within.other_roads(ours, ("ours, kernels of sm_80", "a peer"), room)) == 1


def test_roads_are_among_the_names_of_cases(bench, room, monkeypatch):
    """Where the device has them they are contenders of every case, checked as ours is."""
    within = bench("within")
    monkeypatch.setattr(within, "has_roads", lambda room: True)
    for family in ("attention", "hamming"):
        for case in bench(f"{family}_gpu").CASES:
            built = [contender.name for contender in case.small.build(room)]
            assert len(set(built) & set(within.ROADS)) == 1, case.title


# ---- attention ----


def made_texts(bench, batch, gradient, scale=1.0):
    seeded = torch.Generator().manual_seed(3)
    lengths = batch.lengths()
    rows = torch.randn(int(lengths.sum()), 3, batch.heads, batch.dim, generator=seeded).bfloat16() * scale
    grad = torch.randn(len(rows), batch.heads, batch.dim, generator=seeded).bfloat16()
    table = torch.randn(batch.heads, 21, generator=seeded) if batch.bias else None
    return bench("attention_peers").Texts([rows], lengths, grad, table, gradient)


def by_reference(texts):
    rows = texts.fused[0].double().requires_grad_(texts.gradient)
    table = None if texts.table is None else texts.table.double().requires_grad_(texts.gradient)
    ends = [texts.cu_seqlens] * 2, [texts.longest] * 2
    out, _ = reference.varlen_attention(*rows.unbind(1), *ends[0], *ends[1], bias_table=table)
    if not texts.gradient:
        return [out]
    inputs = [rows, *([] if table is None else [table])]
    of_rows, *of_table = torch.autograd.grad(out, inputs, texts.grad.double())
    return [*of_rows.unbind(1), *of_table]


@pytest.mark.parametrize("scores", [1 << 27, 2000, 7])  # at once: all, a few texts and heads, less than a row
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_in_pieces_is_the_definition(bench, monkeypatch, bias, gradient, scores):
    truth = bench("attention_truth")
    monkeypatch.setattr(truth, "_SCORES", scores)
    batch = bench("attention_gpu").Batch("ragged", 7, 1, 40, 2, 16, bias=bias)
    texts = made_texts(bench, batch, gradient)
    found = truth.answers(texts)
    expected = by_reference(texts)
    assert len(found) == len(expected) == (3 + bias if gradient else 1)
    for (name, got), want in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(got, want.float(), msg=name)


def test_wrong_attention_is_refused(bench):
    """A hundredth of the keys left out, one row of one head wrong, a gradient in another's place, NaN."""
    truth, batch = bench("attention_truth"), bench("attention_gpu").Batch("dense", 2, 200, 200, 2, 32)
    texts = made_texts(bench, batch, gradient=False)
    verify = truth.verifier(texts)
    (right,) = (part.bfloat16() for part in truth.answers(texts).values())
    verify([right])
    ends = torch.tensor([0, 200, 400], dtype=torch.int32)
    used = torch.tensor([200, 198], dtype=torch.int32)
    less, _ = reference.varlen_attention(*texts.fused[0].double().unbind(1), ends, ends, 200, 200, seqused_k=used)
    row, nan = right.clone(), right.clone()
    row[7, 1] *= 1.05
    nan[399, 0, 3] = torch.nan
    for wrong in (less.bfloat16(), row, nan, right.flip(0)):
        with pytest.raises(AssertionError, match="output: a row's error"):
            verify([wrong])
    with pytest.raises(AssertionError, match="shape"):
        verify([right[1:]])
    texts = made_texts(bench, batch, gradient=True)
    verify = truth.verifier(texts)
    q, k, v = (part.bfloat16() for part in truth.answers(texts).values())
    verify([torch.stack((q, k, v), 1)])
    with pytest.raises(AssertionError, match="gradient of q"):
        verify([torch.stack((k, q, v), 1)])
    with pytest.raises(AssertionError, match="gradient of v"):
        verify([torch.stack((q, k, v.roll(1, 0)), 1)])


def test_a_wrong_gradient_of_the_table_is_refused(bench):
    truth, batch = bench("attention_truth"), bench("attention_gpu").Batch("T5 bias", 4, 5, 60, 2, 32, bias=True)
    texts = made_texts(bench, batch, gradient=True)
    verify = truth.verifier(texts)
    *rows, table = truth.answers(texts).values()
    verify([torch.stack(rows, 1).bfloat16(), table])
    with pytest.raises(AssertionError, match="gradient of the table"):
        verify([torch.stack(rows, 1).bfloat16(), table.flip(1)])


def test_blocks_of_flex_attention_reach_just_the_texts(bench):
    batch = bench("attention_gpu").Batch("ragged", 40, 1, 300, 1, 16)
    texts = made_texts(bench, batch, gradient=False)
    many, which = bench("attention_gpu_peers").block_ranges(texts)
    text = torch.repeat_interleave(texts.lengths)
    padded = torch.nn.functional.pad(text, (0, -len(text) % 128), value=-1).view(-1, 128)
    same = (padded[:, None, :, None] == padded[None, :, None, :]) & (padded[:, None, :, None] >= 0)
    needed = same.flatten(2).any(2)
    listed = torch.zeros_like(needed)
    for block, count in enumerate(many.tolist()):
        listed[block, which[block, :count].long()] = True
    assert torch.equal(listed, needed)
    assert all(sorted(row) == list(range(len(many))) for row in which.tolist())


def test_one_backend_of_torch_is_one(bench, monkeypatch):
    """A processor has the flash backend, and no other of those that a GPU has."""
    peers, harness = bench("attention_gpu_peers"), bench("harness")
    monkeypatch.setattr(peers, "_on_gpu", lambda texts: True)
    for batch in (bench("attention_gpu")._dense(2048, 16, 128).small(), bench("attention_gpu")._ragged(64).small()):
        texts = made_texts(bench, batch, gradient=True)
        verify = bench("attention_truth").verifier(texts)
        made = [peers.MAKERS[name](texts, verify) for name in (peers.FLASH, peers.EFFICIENT, peers.CUDNN)]
        admitted, refused = harness.admit(made)
        assert [contender.name for contender in admitted] == [peers.FLASH]
        assert set(refused) == {peers.EFFICIENT, peers.CUDNN}
        assert all(reason.startswith("RuntimeError") for reason in refused.values())


@pytest.mark.parametrize("gradient", [False, True])
def test_packed_attention_of_torch_is_called_as_this_torch_has_it(bench, monkeypatch, gradient):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)

    def stands_in(*arguments):
        signature.bind(*arguments)
        return reference.varlen_attention(*arguments)[0]

    peers = bench("attention_gpu_peers")
    texts = made_texts(bench, bench("attention_gpu")._ragged(64).small(), gradient)
    verify = bench("attention_truth").verifier(texts)
    assert peers.MAKERS[peers.VARLEN](texts, verify) is None
    monkeypatch.setattr(peers, "_on_gpu", lambda texts: True)
    monkeypatch.setattr(varlen, "varlen_attn", stands_in)
    peers.MAKERS[peers.VARLEN](texts, verify).check()


def test_skewed_lengths_have_the_mean_of_sentences(bench):
    for texts in (64, 512, 4096):
        lengths = bench("attention_gpu")._ragged(texts).lengths()
        assert 16 <= lengths.min() <= 20
        assert 200 < lengths.max() <= 512
        assert 75 < lengths.double().mean() < 85
        assert lengths.double().median() < 70


# ---- Hamming ----


@pytest.fixture
def searched(bench, room):
    gpu = bench("hamming_gpu")
    shape = gpu.Shape(3000, 64, 20, 30, 700)  # so few bits that most are tied
    corpus = gpu._corpus(room, shape)
    return gpu, corpus, shape, gpu.truth(corpus, shape)


def test_nearest_codes_are_those_of_the_definition(searched, bench, room):
    gpu, corpus, shape, truth = searched
    distances, indices = reference.hamming_topk(corpus.queries[0], corpus.codes[0], shape.k)
    assert torch.equal(truth.distances, distances)
    assert torch.equal(truth.indices, indices[truth.checked])
    one = replace(shape, queries=1)
    corpus = gpu._corpus(room, one)
    truth = gpu.truth(corpus, one)
    distances, indices = reference.hamming_topk(corpus.queries[0], corpus.codes[0], shape.k)
    assert torch.equal(truth.distances, distances)
    assert torch.equal(truth.indices, indices)


def test_bits_are_counted_in_words_of_all_kinds(bench):
    words = torch.tensor([0, -1, 1, -(2**63), 2**63 - 1, 0x5555555555555555, -2], dtype=torch.int64)
    assert bench("hamming_gpu")._ones(words).tolist() == [0, 64, 1, 1, 63, 32, 63]


def test_answers_of_faiss_are_read(searched, monkeypatch):
    """Its index on the processor in the place of the one on a GPU, whose methods are the same."""
    gpu, corpus, shape, truth = searched
    faiss = pytest.importorskip("faiss")
    verify = gpu.verifier(corpus, shape, truth, False)
    assert gpu._faiss(corpus, shape, verify) is None
    monkeypatch.setattr(type(corpus), "on_host", False)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuIndexBinaryFlat", lambda resources, bits: faiss.IndexBinaryFlat(bits), raising=False)
    gpu._faiss(corpus, shape, verify).check()


def test_wrong_nearest_codes_are_refused(searched):
    gpu, corpus, shape, truth = searched
    distances, indices = reference.hamming_topk(corpus.queries[0], corpus.codes[0], shape.k)
    strictly, loosely = (gpu.verifier(corpus, shape, truth, ordered) for ordered in (True, False))
    for verify in (strictly, loosely):
        verify((distances, indices))
        for wrong, why in (
            ((distances + 1, indices), "distances are wrong"),
            ((distances[:, :-1], indices[:, :-1]), "shape"),
            ((distances, indices.roll(1, 0)), "not at the distances given"),
            ((distances, indices.clamp_min(0) - 3000), "out of range"),
        ):
            with pytest.raises(AssertionError, match=why):
                verify(wrong)
    tied = (distances[:, 1:] == distances[:, :-1]).nonzero()[0]
    place = (int(tied[0]), int(tied[1]))
    twice, swapped = indices.clone(), indices.clone()
    twice[place[0], place[1] + 1] = twice[place]
    swapped[place[0], [place[1], place[1] + 1]] = indices[place[0], [place[1] + 1, place[1]]]
    with pytest.raises(AssertionError, match="named twice"):
        loosely((distances, twice))
    loosely((distances, swapped))
    with pytest.raises(AssertionError, match="ties out of order"):
        strictly((distances, swapped))


def test_a_tie_that_is_not_the_lowest_is_refused(searched):
    """The last of a checked query is another code at the same distance, of a higher index."""
    gpu, corpus, shape, truth = searched
    distances, indices = reference.hamming_topk(corpus.queries[0], corpus.codes[0], shape.k)
    query = int(truth.checked[0])
    every = reference.hamming_distance(corpus.queries[0][[query]], corpus.codes[0])[0]
    others = (every == distances[query, -1]).nonzero()[:, 0]
    other = others[others > indices[query, -1]]
    assert len(other) > 0
    indices = indices.clone()
    indices[query, -1] = other[0]
    gpu.verifier(corpus, shape, truth, False)((distances, indices))
    with pytest.raises(AssertionError, match="lowest indices"):
        gpu.verifier(corpus, shape, truth, True)((distances, indices))
