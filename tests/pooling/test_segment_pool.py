"""segment_pool, its gradient and segment_pool_pack_bits on every backend under the error rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embedding_kernels as ek
from embedding_kernels import reference
from embedding_kernels.ops.pooling import POOLING_MODES
from error_rule import assert_within_rule, unit_roundoff
from operators import assert_same

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTED = ("mean", "weighted_mean", "mean_sqrt_len")
LENGTHS = {
    "ragged": (5, 0, 1, 34, 2, 0),
    "one_long": (300,),
    "all_empty": (0, 0, 0),
    "none": (),
    "many": tuple(range(1, 40)),
}


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


class Case:
    """One call with its definition in float64 and its plain counterpart in float32."""

    def __init__(self, lengths, dim, dtype, mode, weighted=False, **options):
        self.cu_seqlens = offsets(lengths)
        total = int(self.cu_seqlens[-1])
        self.hidden = torch.randn(total, dim).to(dtype)
        self.weights = torch.rand(total) if weighted else None
        self.mode, self.options = mode, options
        if mode == "first_m":
            options.setdefault("m", 3)
        self.dtype = dtype

    def kernel(self, backend, device, hidden=None, weights=None):
        moved = None if self.weights is None else (self.weights if weights is None else weights).to(device)
        return ek.segment_pool(
            (self.hidden if hidden is None else hidden).to(device),
            self.cu_seqlens.to(device),
            self.mode,
            weights=moved,
            backend=backend,
            **self.options,
        )

    def definition(self, hidden, weights=None, **changed):
        options = {**self.options, **changed}
        return reference.segment_pool(hidden, self.cu_seqlens, self.mode, weights=weights, **options)

    def out_dtype(self):
        return self.options.get("out_dtype", self.dtype)

    def exact(self):
        return self.definition(self.hidden.double(), self.weights, out_dtype=torch.float64)

    def plain(self):
        return self.definition(self.hidden.float(), self.weights, out_dtype=self.out_dtype())

    def magnitude(self):
        """The same sums over absolute values, divided by the same norm."""
        terms = self.definition(self.hidden.double().abs(), self.weights, normalize=False, out_dtype=torch.float64)
        if not self.options.get("normalize"):
            return terms
        pooled = self.definition(self.hidden.double(), self.weights, normalize=False, out_dtype=torch.float64)
        return terms / pooled.norm(dim=-1, keepdim=True).clamp_min(reference.pooling.NORM_EPS)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dim", (1, 40, 300))
def test_forward(backend, device, require_kernel, dim, lengths, dtype, mode):
    require_kernel("segment_pool")
    case = Case(LENGTHS[lengths], dim, dtype, mode)
    assert_within_rule(case.kernel(backend, device).cpu(), case.exact(), case.plain(), case.magnitude())


@pytest.mark.parametrize("mode", WEIGHTED)
@pytest.mark.parametrize("weighted", (False, True))
def test_error_does_not_grow_with_the_length(backend, device, require_kernel, mode, weighted):
    """Long sequences of positive values, where a running sum loses a digit for every hundredfold."""
    require_kernel("segment_pool")
    case = Case((5000, 700), 40, torch.float32, mode, weighted)
    case.hidden = case.hidden.abs() + 1
    assert_within_rule(case.kernel(backend, device).cpu(), case.exact(), case.plain(), case.magnitude())


def test_an_infinite_sum_stays_infinite(backend, device):
    hidden = torch.ones(40, 20)
    hidden[5, :10] = float("inf")
    out = ek.segment_pool(hidden.to(device), offsets((40,)).to(device), backend=backend)
    assert out[0].tolist() == [float("inf")] * 10 + [1.0] * 10


OPTIONS = {
    "normalize": {"normalize": True},
    "truncate": {"truncate_dim": 19},
    "both": {"truncate_dim": 33, "normalize": True},
    "narrow": {"out_dtype": torch.bfloat16, "normalize": True},
    "wide": {"out_dtype": torch.float32},
}


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("weighted", (False, True))
def test_forward_options(backend, device, require_kernel, weighted, options, mode):
    require_kernel("segment_pool")
    if weighted and mode not in WEIGHTED:
        pytest.skip("weights are for the means")
    for dtype in (torch.float32, torch.float16):
        case = Case(LENGTHS["ragged"], 70, dtype, mode, weighted, **OPTIONS[options])
        assert_within_rule(case.kernel(backend, device).cpu(), case.exact(), case.plain(), case.magnitude())


def gradients(call, hidden, weights, grad):
    hidden = hidden.clone().requires_grad_()
    weights = None if weights is None else weights.clone().requires_grad_()
    call(hidden, weights).backward(grad)
    return hidden.grad, None if weights is None else weights.grad


def check_gradient(case, backend, device):
    grad = torch.randn_like(case.plain()).to(case.out_dtype())

    got = gradients(lambda x, w: case.kernel(backend, device, x, w), case.hidden, case.weights, grad.to(device))
    exact = gradients(
        lambda x, w: case.definition(x, w, out_dtype=torch.float64),
        case.hidden.double(),
        None if case.weights is None else case.weights.double(),
        grad.double(),
    )
    plain = gradients(
        lambda x, w: case.definition(x, w, out_dtype=torch.float32), case.hidden.float(), case.weights, grad.float()
    )
    # magnitudes of the terms that a gradient sums: |grad| spread over the rows, and along the normalised vector
    scale = exact[0].abs().amax(1, keepdim=True).expand_as(exact[0])
    if case.options.get("normalize"):
        norms = case.definition(case.hidden.double(), case.weights, normalize=False, out_dtype=torch.float64)
        largest = grad.double().abs().amax() * 2 / norms.norm(dim=-1)[norms.norm(dim=-1) > 0].min()
        scale = scale + largest
    assert_within_rule(got[0].cpu(), exact[0], plain[0].to(case.dtype), scale)
    if case.weights is not None:
        terms = (exact[0].abs().amax() * case.hidden.double().abs().amax(1)).mul(70)[:, None]
        assert_within_rule(got[1].cpu()[:, None], exact[1][:, None], plain[1][:, None], terms)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", ("plain", "normalize", "both"))
@pytest.mark.parametrize("weighted", (False, True))
def test_gradient(backend, device, require_kernel, weighted, options, dtype, mode):
    require_kernel("segment_pool")
    if weighted and mode not in WEIGHTED:
        pytest.skip("weights are for the means")
    case = Case(LENGTHS["ragged"], 70, dtype, mode, weighted, **OPTIONS.get(options, {}))
    check_gradient(case, backend, device)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("weighted", (False, True))
def test_gradient_of_long_sequences(backend, device, require_kernel, weighted, mode):
    """Of more rows than one block takes."""
    require_kernel("segment_pool")
    if weighted and mode not in WEIGHTED:
        pytest.skip("weights are for the means")
    check_gradient(Case((300, 0, 129, 20), 70, torch.float32, mode, weighted), backend, device)


def test_gradcheck_of_the_definition():
    """Kernels' gradients are compared with the reference's; the reference's with finite differences."""
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, dtype=torch.float64, requires_grad=True)
    cu_seqlens = offsets((4, 0, 3, 2))
    for mode in POOLING_MODES:
        for normalize in (False, True):
            m = 2 if mode == "first_m" else 1
            used = weights if mode in WEIGHTED else None
            inputs = (hidden,) if used is None else (hidden, used)

            def run(hidden, used=None, mode=mode, m=m, normalize=normalize):
                # an empty sequence's zero vector has no direction to differentiate: left out where normalised
                out = reference.segment_pool(hidden, cu_seqlens, mode, m=m, weights=used, normalize=normalize)
                return out[[0, 2, 3]]

            assert torch.autograd.gradcheck(run, inputs)


def test_second_derivative_through_triton_is_refused(backend, device):
    if backend == "reference":
        pytest.skip("the reference has second derivatives")
    hidden = torch.randn(4, 5, device=device, requires_grad=True)
    out = ek.segment_pool(hidden, offsets((4,)).to(device), normalize=True, backend=backend)
    (first,) = torch.autograd.grad(out.pow(2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives are not supported|once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_gradient_of_any_stride(backend, device, mode):
    hidden = torch.randn(40, 24, device=device)
    cu_seqlens = offsets((10, 0, 30)).to(device)
    m = 2 if mode == "first_m" else 1
    results = []
    for expanded in (True, False):
        x = hidden.clone().requires_grad_()
        out = ek.segment_pool(x, cu_seqlens, mode, m=m, backend=backend)
        # the gradient of a sum has stride 0
        grad = torch.ones((), device=device).expand_as(out) if expanded else torch.ones_like(out)
        out.backward(grad)
        results.append(x.grad)
    assert_same(*results)


def test_max_gradient_goes_to_the_first_maximum(backend, device):
    hidden = torch.tensor([[1.0, 3.0], [2.0, 3.0], [2.0, 3.0]], device=device, requires_grad=True)
    ek.segment_pool(hidden, offsets((3,)).to(device), "max", backend=backend).sum().backward()
    assert hidden.grad.tolist() == [[0, 1], [1, 0], [0, 0]]


def test_max_gradient_among_equals(backend, device):
    """Few values in many rows; NaN is the largest, and a column of -inf has a first maximum too."""
    hidden = torch.randint(3, (400, 20)).float()
    hidden[[150, 260], 4] = float("nan")
    hidden[:, 5] = float("-inf")
    grads = []
    for name in (backend, "reference"):
        rows = hidden.to(device).requires_grad_()
        ek.segment_pool(rows, offsets((390, 0, 10)).to(device), "max", backend=name).backward(
            torch.arange(1.0, 61, device=device).view(3, 20)
        )
        grads.append(rows.grad)
    assert_same(*grads)


@pytest.mark.parametrize("mode", ("mean", "max"))
def test_so_many_rows_that_their_parts_grow(backend, device, mode):
    case = Case((33000, 5), 4, torch.float32, mode)
    assert_within_rule(case.kernel(backend, device).cpu(), case.exact(), case.plain(), case.magnitude())


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_offsets_that_nobody_checks_are_clamped(backend, monkeypatch, mode):
    """As on a GPU, where values are not read on the host: the emulation sees every access."""
    if backend != "cuda_host":
        pytest.skip("refused on the CPU; nothing is seen of a GPU's accesses")
    monkeypatch.delenv("EMBEDDING_KERNELS_CHECK")
    ops, m = torch.ops.embedding_kernels_cuda_host, 2 if mode == "first_m" else 1
    hidden = torch.randn(140, 9)
    shape = (4, 2, 9) if mode == "first_m" else (4, 9)
    for values in ((-7, 3, 3, 139, 2**31 - 1), (40, 20, 10, 150, 0), (-5, -4, -3, -2, -1), (141, 141, 200, 200, 141)):
        cu_seqlens = torch.tensor(values, dtype=torch.int32)
        assert ops.segment_pool(hidden, cu_seqlens, mode, m).shape == shape
        ops.segment_pool_pack_bits(hidden, cu_seqlens, mode, m)
        if list(values) == sorted(values):
            ops.segment_pool_backward(
                torch.randn(shape), hidden, cu_seqlens, 140, 9, torch.float32, mode, m, None, True
            )


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_a_nan_stays_in_its_sequence(backend, device, mode):
    hidden = torch.randn(30, 20)
    cu_seqlens = offsets((10, 10, 10))
    m = 2 if mode == "first_m" else 1
    clean = ek.segment_pool(hidden.to(device), cu_seqlens.to(device), mode, m=m, backend=backend)
    hidden[10], hidden[19] = float("nan"), float("inf")
    dirty = ek.segment_pool(hidden.to(device), cu_seqlens.to(device), mode, m=m, backend=backend)
    assert_same(dirty[[0, 2]], clean[[0, 2]])
    assert not dirty[1].isfinite().all()


def test_zero_weights_give_zero(backend, device):
    hidden = torch.randn(6, 9, device=device, requires_grad=True)
    weights = torch.tensor([0.0, 0, 0, 1, 2, 0], device=device)
    out = ek.segment_pool(hidden, offsets((3, 3)).to(device), weights=weights, normalize=True, backend=backend)
    assert out[0].tolist() == [0.0] * 9
    out.sum().backward()
    assert hidden.grad[:3].tolist() == [[0.0] * 9] * 3


def test_means_equal_sentence_transformers(backend, device):
    """Its masked mean, over the padded batch that this packed one came from."""
    pooling = pytest.importorskip("sentence_transformers.models").Pooling
    mask = torch.arange(12)[None] < torch.tensor([12, 3, 7])[:, None]
    padded = torch.randn(3, 12, 32)
    packed = padded[mask].to(device)
    cu_seqlens, _, _ = ek.cu_seqlens_from_mask(mask)
    names = {"mean": "mean", "mean_sqrt_len": "mean_sqrt_len_tokens", "weighted_mean": "weightedmean", "max": "max"}
    for ours, theirs in {**names, "first": "cls", "last": "lasttoken"}.items():
        features = {"token_embeddings": padded.clone(), "attention_mask": mask.long()}
        expected = pooling(32, pooling_mode=theirs)(features)["sentence_embedding"]
        got = ek.segment_pool(packed, cu_seqlens.to(device), ours, backend=backend)
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_same_bits_for_any_thread_count(mode, threads):
    """Few long sequences, so that columns of one are shared out, and many short ones."""
    m = 3 if mode == "first_m" else 1
    for lengths in ((4000,), (900, 3, 700), (40,) * 60):
        hidden = torch.randn(sum(lengths), 333, requires_grad=True)
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            out = ek.segment_pool(hidden, offsets(lengths), mode, m=m, normalize=True, backend="cpu")
            (grad,) = torch.autograd.grad(out.square().sum(), hidden)
            results.append((out.detach(), grad))
        assert_same(results[0], results[1])


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pack_bits_are_the_signs(backend, device, require_kernel, dtype, mode):
    require_kernel("segment_pool_pack_bits")
    case = Case(LENGTHS["ragged"], 77, dtype, mode)
    m = case.options.get("m", 1)
    moved = (case.hidden.to(device), case.cu_seqlens.to(device))
    packed = ek.segment_pool_pack_bits(*moved, mode, m=m, truncate_dim=60, backend=backend).cpu()
    got = reference.hamming.unpack_bits(packed)[..., :60].bool()
    exact = case.definition(case.hidden.double(), truncate_dim=60, out_dtype=torch.float64)
    magnitude = case.definition(case.hidden.double().abs(), truncate_dim=60, out_dtype=torch.float64)
    # a sign may differ only where rounding in float32 can cross zero
    certain = exact.abs() > 40 * unit_roundoff(torch.float32) * magnitude
    certain |= magnitude == 0
    assert torch.equal(got[certain], (exact > 0)[certain])
    assert certain.double().mean() > 0.99
    assert not reference.hamming.unpack_bits(packed)[..., 60:].any()


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_no_sequences(backend, device, mode):
    m = 3 if mode == "first_m" else 1
    hidden = torch.randn(0, 20, device=device, requires_grad=True)
    leading = (0, 3) if mode == "first_m" else (0,)
    packed = ek.segment_pool_pack_bits(hidden.detach(), offsets(()).to(device), mode, m=m, backend=backend)
    assert packed.shape == (*leading, 3)
    out = ek.segment_pool(hidden, offsets(()).to(device), mode, m=m, normalize=True, backend=backend)
    assert out.shape == (*leading, 20)
    out.sum().backward()
    assert hidden.grad.shape == (0, 20)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pack_bits_equal_two_steps(mode):
    case = Case(LENGTHS["many"], 130, torch.float32, mode)
    m = case.options.get("m", 1)
    pooled = ek.segment_pool(case.hidden, case.cu_seqlens, mode, m=m)
    two_steps = ek.pack_bits(pooled.flatten(0, -2)).reshape(*pooled.shape[:-1], -1)
    assert_same(ek.segment_pool_pack_bits(case.hidden, case.cu_seqlens, mode, m=m), two_steps)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pack_bits_of_long_sequences_equal_two_steps(backend, device, require_kernel, mode):
    require_kernel("segment_pool_pack_bits")
    case = Case((300, 0, 20), 150, torch.float32, mode)
    m = case.options.get("m", 1)
    moved = (case.hidden.to(device), case.cu_seqlens.to(device), mode)
    two_steps = reference.hamming.pack_bits(case.kernel(backend, device).cpu().flatten(0, -2))
    packed = ek.segment_pool_pack_bits(*moved, m=m, backend=backend).cpu()
    assert_same(packed, two_steps.view(packed.shape))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_drawn(data):
    lengths = data.draw(st.lists(st.integers(0, 60), max_size=8), "lengths")
    mode = data.draw(st.sampled_from(sorted(POOLING_MODES)), "mode")
    options = {"normalize": data.draw(st.booleans(), "normalize")}
    dim = data.draw(st.integers(1, 150), "dim")
    if data.draw(st.booleans(), "truncated"):
        options["truncate_dim"] = data.draw(st.integers(1, dim), "truncate_dim")
    if mode == "first_m":
        options["m"] = data.draw(st.integers(1, 5), "m")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    torch.set_num_threads(data.draw(st.integers(1, 3), "threads"))
    dtype = data.draw(st.sampled_from(FLOATS), "dtype")
    weighted = mode in WEIGHTED and data.draw(st.booleans(), "weighted")
    case = Case(lengths, dim, dtype, mode, weighted, **options)
    assert_within_rule(case.kernel("cpu", "cpu"), case.exact(), case.plain(), case.magnitude())


def test_rows_past_two_to_the_31_elements(tmp_path):
    import numpy as np

    apart = 3 << 29
    storage = torch.from_numpy(np.memmap("/dev/zero", dtype=np.float32, mode="c", shape=(apart + 4,)))
    far = storage.as_strided((2, 4), (apart, 1))
    far[1] = 3.0
    out = ek.segment_pool(far, offsets((1, 1)))
    assert out.tolist() == [[0.0] * 4, [3.0] * 4]


def test_no_graph_is_kept_of_the_rows_for_a_plain_mean():
    """A mean's gradient does not need its rows: they are free once the forward is done."""
    hidden = torch.randn(50, 8, requires_grad=True)
    out = ek.segment_pool(hidden, offsets((20, 30)))
    saved = [t for t in (getattr(out.grad_fn, "saved_tensors", ()) or ()) if t is not None]
    assert all(t.shape != hidden.shape for t in saved)
