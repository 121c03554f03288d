"""Dynamic shapes under torch.compile, torch.export and AOTInductor."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import embedding_kernels as ek
from embedding_kernels import _library
from operators import assert_same


def ragged(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows, offsets, mask and padded rows whose sizes all differ from step to step."""
    batch, length = 3 + step, 10 + 2 * step
    lengths = torch.arange(batch) % (length - 1) + 2
    mask = torch.arange(length)[None] < lengths[:, None]
    padded = torch.randn(batch, length, 24)
    cu_seqlens, _, _ = ek.cu_seqlens_from_mask(mask)
    return padded[mask], cu_seqlens, mask, padded


def codes(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rows_to_score(step: int) -> torch.Tensor:
    return torch.arange((2 + step) * (7 + step)).reshape(2 + step, 7 + step) % (30 + step)


def heads(step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows of two heads, their offsets and the longest text's length."""
    hidden, cu_seqlens, mask, _ = ragged(step)
    return torch.randn(hidden.shape[0], 2, 16), cu_seqlens, int(mask.sum(1).max())


def attend(q: torch.Tensor, cu_seqlens: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    return ek.varlen_attention(
        q, q, q, cu_seqlens, cu_seqlens, longest, longest, window_left=longest - 2, return_lse=True
    )


def merge(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ek.merge_attention(q, q[..., 0].T, 2 * q, q[..., 1].T)


def add_and_norm(step: int) -> tuple[torch.Tensor, ...]:
    """Rows, residual, weight and bias."""
    rows = ragged(step)[0]
    return rows, 2 * rows, torch.randn(24), torch.randn(24)


def first_and_last(step: int) -> tuple[torch.Tensor, ...]:
    """Rows, and each text's last row to be copied over its first."""
    hidden, cu_seqlens, _, _ = ragged(step)
    offsets = cu_seqlens.long()
    return hidden, offsets[1:] - 1, offsets[:-1]


def rows_before_a_gated_unit(step: int) -> tuple[torch.Tensor, ...]:
    """Values with gates, a bias of both, offsets."""
    hidden, cu_seqlens, _, _ = ragged(step)
    return hidden, hidden[0], cu_seqlens


def learn(documents: torch.Tensor, words: torch.Tensor, tokens: torch.Tensor, cu_seqlens: torch.Tensor):
    """A step on copies, so that it may be called again: the losses and what has been learned."""
    documents, words = documents.clone(), words.clone()
    zeros, rows = words.new_zeros(words.shape[0]), torch.arange(documents.shape[0])
    squares = documents.new_zeros(documents.shape[0])
    log_expected = torch.zeros_like(zeros)
    loss = ek.paragraph_vector_step(
        documents, squares, words, zeros, zeros.clone(), rows, tokens, cu_seqlens, tokens[:2], log_expected, 0.1
    )
    return loss, documents, words


def corpus(step: int) -> tuple[torch.Tensor, ...]:
    _, cu_seqlens, mask, _ = ragged(step)
    tokens = torch.arange(int(mask.sum()), dtype=torch.int32) % 11
    return torch.randn(mask.shape[0], 9), torch.randn(11, 9), tokens, cu_seqlens


def lists(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of ragged lists of passages, and what meets them."""
    cu_passages = torch.tensor((0, *(3 + step + place for place in range(2 + step)))).cumsum(0).int()
    count = 2 + step
    return torch.randn(int(cu_passages[-1]), 3, 16), torch.randn(count, 3, 5, 16), cu_passages


CALLS = {
    "anchor_attention": lambda step: (lambda v, q, c: ek.anchor_attention(v, q, c), lists(step)),
    "anchor_scores": lambda step: (lambda v, q, c: ek.anchor_scores(v, q[:, :, 0], c), lists(step)),
    "anchor_topk": lambda step: (lambda v, q, c: ek.anchor_topk(v, q[:, :, 0], c, 2), lists(step)),
    "varlen_attention": lambda step: (attend, heads(step)),
    "merge_attention": lambda step: (merge, heads(step)[:1]),
    "paragraph_vector_step": lambda step: (learn, corpus(step)),
    "pack_bits": lambda step: (ek.pack_bits, (ragged(step)[0],)),
    "hamming_distance": lambda step: (ek.hamming_distance, (codes(2 + step, 0), codes(30 + step, 1))),
    "hamming_topk": lambda step: (
        lambda a, b, k: ek.hamming_topk(a, b, k),
        (codes(2 + step, 0), codes(30 + step, 1), 3 + step),
    ),
    "hamming_range": lambda step: (
        lambda a, b, r: ek.hamming_range(a, b, r),
        (codes(2 + step, 0), codes(30 + step, 1), 60 + step),
    ),
    "rescore_topk": lambda step: (
        lambda q, c, v, k: ek.rescore_topk(q, c, v, k),
        (torch.randn(2 + step, 24), rows_to_score(step), torch.randn(30 + step, 24), 3 + step),
    ),
    "grouped_softmax": lambda step: (lambda x: ek.grouped_softmax(x, 3), ragged(step)[:1]),
    "geglu_segment_pool": lambda step: (lambda x, b, c: ek.geglu_segment_pool(x, b, c), rows_before_a_gated_unit(step)),
    "segment_pool": lambda step: (lambda x, c: ek.segment_pool(x, c, normalize=True), ragged(step)[:2]),
    "segment_pool_pack_bits": lambda step: (lambda x, c: ek.segment_pool_pack_bits(x, c), ragged(step)[:2]),
    "add_rms_norm": lambda step: (
        lambda x, r, w: ek.add_rms_norm(x, r, w, one_plus_weight=True),
        add_and_norm(step)[:3],
    ),
    "add_layer_norm": lambda step: (lambda x, r, w, b: ek.add_layer_norm(x, r, w, bias=b), add_and_norm(step)),
    "token_prepend": lambda step: (ek.token_prepend, first_and_last(step)),
    "token_prepend_rms_norm": lambda step: (
        lambda x, s, t, w: ek.token_prepend_rms_norm(x, 2 * x, s, t, w),
        (*first_and_last(step), torch.randn(24)),
    ),
    "pack_padded": lambda step: (
        lambda p, m, t: ek.pack_padded(p, m, t),
        (ragged(step)[3], ragged(step)[2], ragged(step)[0].shape[0]),
    ),
    "unpack_padded": lambda step: (lambda p, m: ek.unpack_padded(p, m), (ragged(step)[0], ragged(step)[2])),
}


def test_every_public_operator_is_here():
    from embedding_kernels.ops._registry import OPERATORS

    assert set(CALLS) == {name for name in OPERATORS if not name.endswith("_backward")}


@pytest.mark.parametrize("name", CALLS)
def test_ragged_batches_compile_at_most_twice(name):
    torch._dynamo.reset()
    compilations = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        compilations.append(graph)
        return graph.forward

    compiled = None
    for step in range(5):
        function, args = CALLS[name](step)
        if compiled is None:
            compiled = torch.compile(function, fullgraph=True, backend=counting)
        assert_same(compiled(*args), function(*args))
    assert len(compilations) <= 2


class Pooler(torch.nn.Module):
    """Hidden rows to a unit vector and a binary code."""

    def forward(self, hidden: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = ek.segment_pool(hidden, cu_seqlens, "mean", normalize=True)
        return pooled, ek.pack_bits(pooled)


def exported() -> torch.export.ExportedProgram:
    hidden, cu_seqlens, _, _ = ragged(0)
    # torch specialises sizes 0 and 1: at least two sequences, so three offsets
    tokens, places = torch.export.Dim("tokens", min=2), torch.export.Dim("offsets", min=3)
    return torch.export.export(Pooler(), (hidden, cu_seqlens), dynamic_shapes=({0: tokens}, {0: places}))


def test_export_keeps_the_operators_and_serves_other_sizes():
    program = exported()
    targets = [str(node.target) for node in program.graph.nodes]
    assert "embedding_kernels.segment_pool_forward.default" in targets
    assert "embedding_kernels.pack_bits.default" in targets
    for step in (1, 7):
        hidden, cu_seqlens, _, _ = ragged(step)
        assert_same(program.module()(hidden, cu_seqlens), Pooler()(hidden, cu_seqlens))


class Near(torch.nn.Module):
    """Rows whose codes are near to the first, in an output whose size depends on values."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = ek.pack_bits(hidden)
        offsets, _, indices = ek.hamming_range(codes[:1], codes, 12)
        return offsets, hidden[indices] * 2


def test_a_size_that_depends_on_values_is_compiled_and_exported():
    torch._dynamo.reset()
    compiled = torch.compile(Near(), fullgraph=True, backend="aot_eager")
    program = torch.export.export(
        Near(), (torch.randn(50, 24),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
    )
    assert "embedding_kernels.hamming_range.default" in [str(node.target) for node in program.graph.nodes]
    sizes = set()
    for rows in (50, 9, 300):
        hidden = torch.randn(rows, 24)
        expected = Near()(hidden)
        assert_same(compiled(hidden), expected)
        assert_same(program.module()(hidden), expected)
        sizes.add(expected[1].shape[0])
    assert len(sizes) == 3


@pytest.mark.slow
def test_inductor_forward_and_backward():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, c: ek.segment_pool(x * 2, c, "max").relu(), fullgraph=True, dynamic=True, backend="inductor"
    )
    for step in (0, 3):
        hidden, cu_seqlens, _, _ = ragged(step)
        grads = []
        for function in (compiled, lambda x, c: ek.segment_pool(x * 2, c, "max").relu()):
            x = hidden.clone().requires_grad_()
            function(x, cu_seqlens).sum().backward()
            grads.append(x.grad)
        assert_same(*grads)


@pytest.mark.slow
def test_aot_inductor_runs_where_only_the_library_is_loaded(tmp_path):
    """The C++ kernels serve a process that knows nothing of this package but the one file."""
    package = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "pooler.pt2"))
    hidden, cu_seqlens, _, _ = ragged(5)
    torch.save((hidden, cu_seqlens, Pooler()(hidden, cu_seqlens)), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        f"torch.ops.load_library({str(_library.CPU.path)!r})\n"
        f"hidden, cu_seqlens, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"model = torch._inductor.aoti_load_package({package!r})\n"
        "for got, want in zip(model(hidden, cu_seqlens), expected): assert torch.equal(got, want)\n"
        "assert 'embedding_kernels' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
