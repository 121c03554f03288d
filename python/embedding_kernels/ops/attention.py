"""Attention over packed sequences, bidirectional by default, and the merging of two partial results."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._checks import (
    FLOATS,
    check_offsets,
    check_range,
    check_same_device,
    check_size,
    check_tensor,
    describe,
    dtype_name,
    refuse,
    values_readable,
)
from ._registry import Gradient, call, register

_QUERIES = 'a float32, bfloat16 or float16 tensor [Tq, Hq, Dh] (float64 runs with backend="reference")'
_OFFSETS = "an int32 tensor [sequences + 1]"
_LEAST_HEAD_DIM, _MOST_HEAD_DIM, _HEAD_DIM_STEP = 16, 256, 8


@overload
def varlen_attention(*args: Any, return_lse: Literal[True], **kwargs: Any) -> tuple[Tensor, Tensor]: ...
@overload
def varlen_attention(*args: Any, return_lse: Literal[False] = False, **kwargs: Any) -> Tensor: ...
def varlen_attention(  # type: ignore[misc]  # the overloads differ in return_lse alone
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    bias_table: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Fused attention of packed sequences, bidirectional unless told otherwise.

    Sequence s holds rows ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` of ``q`` and likewise of ``k`` and ``v``. With
    i a query, j a key of the same sequence, and p their positions::

        s_ij  = scale · rope(q_i) · rope(k_j)
        s_ij  = softcap · tanh(s_ij / softcap)                 where softcap > 0
        s_ij += bias_table[head, clamp(p_j − p_i, ±R) + R]     where a table is given
        out_i = Σ_j softmax_j(s_ij) v_j,    lse_i = ln Σ_j exp(s_ij)

    over the keys that i may see: p_j ≤ p_i where ``causal``, p_j ≥ p_i − ``window_left`` and p_j ≤ p_i +
    ``window_right`` where those are not −1. Positions count from the start of each sequence, for queries as for keys,
    unless they are given. A query that sees no key has output 0, lse −∞ and gradient 0. Query head h reads key head
    ``h // (Hq / Hkv)``.

    No score is ever in memory: time aside, the cost is linear in the tokens (Dao et al., "FlashAttention", 2022;
    the relative bias is that of Raffel et al., "T5", 2020, exact with R = 91 for encoders and R = 113 for decoders;
    rotary embedding: Su et al., "RoFormer", 2021). Softmax and sums are float32. Differentiable in q, k, v and the
    table, through the output and through lse. Under autocast q, k and v are cast.

    Args:
        q: float32, bfloat16 or float16 ``[Tq, Hq, Dh]``, Dh a multiple of 8 from 16 to 256; float64 with
            ``backend="reference"``. Any strides whose last dimension is dense, as for k and v.
        k: ``[Tk, Hkv, Dh]``; Hkv divides Hq.
        v: ``[Tk, Hkv, Dv]``, Dv a multiple of 8 from 16 to 256.
        cu_seqlens_q: int32 ``[S + 1]``, from 0, never falling, to Tq.
        cu_seqlens_k: the same for the keys.
        max_seqlen_q: at least the longest sequence of queries.
        max_seqlen_k: the same for the keys.
        scale: factor of the scores; 1 / √Dh by default (T5 wants 1).
        causal: keys after the query are not seen.
        window_left: keys further than this before the query are not seen; −1 for no limit.
        window_right: the same after it.
        softcap: 0 for none.
        bias_table: float32 ``[Hq, 2R + 1]``, added by clamped key − query.
        rope_cos: float32 ``[P, Dr / 2]``, row = position, Dr ≤ Dh: the first Dr dimensions are rotated, dimension i
            with i + Dr/2; queries and keys alike.
        rope_sin: the same shape.
        positions_q: int32 ``[Tq]``, at least 0 (less than P with rope).
        positions_k: int32 ``[Tk]``.
        seqused_k: int32 ``[S]``: only so many of a sequence's keys count.
        dropout_p: must be 0.
        return_lse: return the logarithms of the sums too.
        backend: as in `pack_bits`.

    Returns:
        ``[Tq, Hq, Dv]`` in the dtype of q; with ``return_lse`` also float32 ``[Hq, Tq]``, natural logarithm.

    Raises:
        ValueError: bad dtype, rank or size; values of offsets, positions and seqused_k out of range (on CUDA only
            under EMBEDDING_KERNELS_CHECK=1; kernels stay within bounds).
    """
    if dropout_p != 0:
        refuse("varlen_attention", "dropout_p", "0 (dropout is not supported)", str(dropout_p))
    out, lse = call(
        _VARLEN_ATTENTION,
        backend,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        causal,
        window_left,
        window_right,
        softcap,
        bias_table,
        rope_cos,
        rope_sin,
        positions_q,
        positions_k,
        seqused_k,
    )
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from the attention over each (a shared prefix and a tail).

    ``lse = ln(exp(lse_a) + exp(lse_b))`` and ``out = exp(lse_a − lse) out_a + exp(lse_b − lse) out_b``, formed in
    float32. A side whose lse is −∞ counts nothing; where both are, the output is 0 and lse −∞. Differentiable in all
    four.

    Args:
        out_a: float32, bfloat16 or float16 ``[T, H, D]``, as `varlen_attention` gives it.
        lse_a: float32 ``[H, T]``, natural logarithm.
        out_b: as ``out_a``.
        lse_b: as ``lse_a``.
        backend: as in `pack_bits`.

    Returns:
        ``out [T, H, D]`` in the dtype of ``out_a`` and ``lse`` float32 ``[H, T]``.

    Raises:
        ValueError: bad dtype, rank or size.
    """
    return call(_MERGE_ATTENTION, backend, out_a, lse_a, out_b, lse_b)


# ---- checks, in the order and the words of csrc/cpu/attention.cpp ----


def _check_head_dim(op: str, argument: str, tensor: Tensor) -> None:
    dim = tensor.shape[2]
    if dim < _LEAST_HEAD_DIM or dim > _MOST_HEAD_DIM or dim % _HEAD_DIM_STEP:
        expected = f"with heads of a multiple of {_HEAD_DIM_STEP} from {_LEAST_HEAD_DIM} to {_MOST_HEAD_DIM} dimensions"
        refuse(op, argument, expected, describe(tensor))


def _check_inputs(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensor(op, "q", q, _QUERIES, FLOATS, 3)
    name = dtype_name(q.dtype)
    check_tensor(op, "k", k, f"a {name} tensor [Tk, Hkv, Dh], as q", (q.dtype,), 3)
    check_tensor(op, "v", v, f"a {name} tensor [Tk, Hkv, Dv], as q", (q.dtype,), 3)
    check_size(op, "k", k, 2, q.shape[2], "the heads' dimensions in q")
    check_size(op, "v", v, 0, k.shape[0], "the rows of k")
    check_size(op, "v", v, 1, k.shape[1], "the heads of k")
    _check_head_dim(op, "q", q)
    _check_head_dim(op, "v", v)
    if q.shape[1] < 1 or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        refuse(op, "k", f"with a number of heads that divides the {int(q.shape[1])} of q", describe(k))


def _check_positions(op: str, argument: str, positions: Tensor | None, rows: Tensor, limit: int | None) -> None:
    """Values from 0, and less than ``limit`` where there is one."""
    if positions is None:
        return
    side = argument[-1]
    check_tensor(op, argument, positions, f"an int32 tensor [T{side}]", (torch.int32,), 1)
    check_size(op, argument, positions, 0, rows.shape[0], f"one for each row of {side}")
    if values_readable(positions) and positions.numel():
        lowest, highest = int(positions.min()), int(positions.max())
        if lowest < 0:
            refuse(op, argument, "at least 0 everywhere", str(lowest))
        if limit is not None and highest >= limit:
            refuse(op, argument, f"less than {limit} everywhere (the rows of rope_cos)", str(highest))


def _check_lengths(op: str, side: str, offsets: Tensor, most: int, positions: Tensor | None, limit: int | None) -> None:
    check_range(op, f"max_seqlen_{side}", most, 0)
    if not values_readable(offsets) or offsets.shape[0] < 2:
        return
    longest = int(offsets.diff().max())
    if longest > most:
        refuse(op, f"max_seqlen_{side}", f"at least {longest} (the longest sequence)", str(int(most)))
    if limit is not None and positions is None and longest > limit:
        refuse(op, "rope_cos", f"of at least {longest} rows (the longest sequence)", f"{limit} rows")


def _check_seqused(op: str, seqused_k: Tensor | None, cu_seqlens_k: Tensor) -> None:
    if seqused_k is None:
        return
    check_tensor(op, "seqused_k", seqused_k, "an int32 tensor [sequences]", (torch.int32,), 1)
    check_size(op, "seqused_k", seqused_k, 0, cu_seqlens_k.shape[0] - 1, "the number of sequences")
    if values_readable(seqused_k) and seqused_k.numel():
        wrong = torch.nonzero((seqused_k < 0) | (seqused_k > cu_seqlens_k.diff()))
        if wrong.numel():
            place = int(wrong[0])
            length = int(cu_seqlens_k[place + 1] - cu_seqlens_k[place])
            refuse(op, "seqused_k", f"from 0 to {length} in place {place}", str(int(seqused_k[place])))


def _check_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    bias_table: Tensor | None = None,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    positions_q: Tensor | None = None,
    positions_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> None:
    _check_inputs(op, q, k, v)
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(op, name, offsets, _OFFSETS, (torch.int32,), 1)
        if offsets.shape[0] == 0:
            refuse(op, name, _OFFSETS, describe(offsets))
    check_size(op, "cu_seqlens_k", cu_seqlens_k, 0, cu_seqlens_q.shape[0], "as cu_seqlens_q")
    check_range(op, "window_left", window_left, -1)
    check_range(op, "window_right", window_right, -1)
    if not 0 <= softcap < float("inf"):
        refuse(op, "softcap", "a finite number of at least 0", f"{softcap:g}")
    if bias_table is not None:
        check_tensor(op, "bias_table", bias_table, "a float32 tensor [Hq, 2R + 1]", (torch.float32,), 2)
        check_size(op, "bias_table", bias_table, 0, q.shape[1], "the heads of q")
        if bias_table.shape[1] % 2 == 0:
            refuse(op, "bias_table", "of odd size in dimension 1 (2R + 1)", describe(bias_table))
    limit = None
    if rope_cos is not None or rope_sin is not None:
        if rope_cos is None or rope_sin is None:
            missing = "rope_cos" if rope_cos is None else "rope_sin"
            refuse(op, missing, "given with the other table of the rotation", "None")
        check_tensor(op, "rope_cos", rope_cos, "a float32 tensor [P, Dr / 2]", (torch.float32,), 2)
        check_tensor(op, "rope_sin", rope_sin, "a float32 tensor [P, Dr / 2]", (torch.float32,), 2)
        check_size(op, "rope_sin", rope_sin, 0, rope_cos.shape[0], "as rope_cos")
        check_size(op, "rope_sin", rope_sin, 1, rope_cos.shape[1], "as rope_cos")
        check_range(op, "the last size of rope_cos", rope_cos.shape[1], 1, q.shape[2] // 2)
        limit = rope_cos.shape[0]
    check_same_device(
        op,
        "q",
        q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        bias_table=bias_table,
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        positions_q=positions_q,
        positions_k=positions_k,
        seqused_k=seqused_k,
    )
    check_offsets(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    check_offsets(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    _check_positions(op, "positions_q", positions_q, q, limit)
    _check_positions(op, "positions_k", positions_k, k, limit)
    _check_lengths(op, "q", cu_seqlens_q, max_seqlen_q, positions_q, limit)
    _check_lengths(op, "k", cu_seqlens_k, max_seqlen_k, positions_k, limit)
    _check_seqused(op, seqused_k, cu_seqlens_k)


def _check_varlen_attention(*args: Any) -> None:
    _check_attention("varlen_attention", *args)


def _check_lse(op: str, argument: str, lse: Tensor | None, out: Tensor, rows: str) -> None:
    if lse is None:
        return
    check_tensor(op, argument, lse, "a float32 tensor [H, T]", (torch.float32,), 2)
    check_size(op, argument, lse, 0, out.shape[1], f"the heads of {rows}")
    check_size(op, argument, lse, 1, out.shape[0], f"the rows of {rows}")


def _check_like(op: str, argument: str, tensor: Tensor, like: Tensor, name: str) -> None:
    check_tensor(op, argument, tensor, f"a {dtype_name(like.dtype)} tensor like {name}", (like.dtype,), like.dim())
    for dim, size in enumerate(like.shape):
        check_size(op, argument, tensor, dim, size, f"as {name}")


def _check_varlen_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any
) -> None:
    op = "varlen_attention_backward"
    _check_attention(op, q, k, v, *options)
    check_tensor(op, "out", out, f"a {dtype_name(q.dtype)} tensor [Tq, Hq, Dv]", (q.dtype,), 3)
    for dim, size in enumerate((q.shape[0], q.shape[1], v.shape[2])):
        check_size(op, "out", out, dim, size, "as varlen_attention gives it")
    _check_like(op, "grad_out", grad_out, out, "out")
    _check_lse(op, "lse", lse, out, "out")
    _check_lse(op, "grad_lse", grad_lse, out, "out")
    check_same_device(op, "q", q, out=out, grad_out=grad_out, lse=lse, grad_lse=grad_lse)


def _check_merge(op: str, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    expected = 'a float32, bfloat16 or float16 tensor [T, H, D] (float64 runs with backend="reference")'
    check_tensor(op, "out_a", out_a, expected, FLOATS, 3)
    _check_like(op, "out_b", out_b, out_a, "out_a")
    _check_lse(op, "lse_a", lse_a, out_a, "out_a")
    _check_lse(op, "lse_b", lse_b, out_a, "out_a")
    check_same_device(op, "out_a", out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)


def _check_merge_attention_backward(grad_out: Tensor, grad_lse: Tensor | None, *saved: Tensor) -> None:
    op = "merge_attention_backward"
    _check_merge(op, *saved)
    _check_like(op, "grad_out", grad_out, saved[0], "out_a")
    _check_lse(op, "grad_lse", grad_lse, saved[0], "out_a")
    check_same_device(op, "out_a", saved[0], grad_out=grad_out, grad_lse=grad_lse)


# ---- shapes, gradients, counts ----


def _fake_varlen_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty((tokens, heads, v.shape[2])), q.new_empty((heads, tokens), dtype=torch.float32)


def _fake_varlen_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = options[_BIAS_TABLE - 3] if len(options) > _BIAS_TABLE - 3 else None
    grads = (q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape))
    return *grads, q.new_empty((0, 0) if table is None else table.shape, dtype=torch.float32)


#: places of arguments among the inputs of varlen_attention
_BIAS_TABLE = 12
_TENSOR_OPTIONS = (3, 4, *range(_BIAS_TABLE, 18))


def _setup_varlen_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.plain = [None if place in (0, 1, 2, *_TENSOR_OPTIONS) else value for place, value in enumerate(inputs)]
    ctx.save_for_backward(*output, *inputs[:3], *(inputs[place] for place in _TENSOR_OPTIONS))
    # lse seldom has a gradient: None then, not zeros
    ctx.set_materialize_grads(False)


def _backward_varlen_attention(
    run: Any, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    out, lse, q, k, v, *tensors = ctx.saved_tensors
    options = list(ctx.plain)
    for place, tensor in zip(_TENSOR_OPTIONS, tensors, strict=True):
        options[place] = tensor
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = run(grad_out, grad_lse, out, lse, q, k, v, *options[3:])
    results: list[Tensor | None] = [None] * len(options)
    for place, grad in zip((0, 1, 2, _BIAS_TABLE), grads, strict=True):
        results[place] = grad if ctx.wanted[place] else None
    return tuple(results)


def _setup_merge_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward_merge_attention(
    run: Any, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = run(torch.zeros_like(saved[0]) if grad_out is None else grad_out, grad_lse, *saved)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, ctx.wanted, strict=True))


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], offsets: tuple[int, ...]) -> int:
    """Two products of a score with a head's dimensions, as if all sequences were of the mean length."""
    sequences = max(offsets[0] - 1, 1)
    return 2 * q[0] * q[1] * k[0] * (q[2] + v[2]) // sequences


_VARLEN_ATTENTION_BACKWARD = register(
    "varlen_attention_backward",
    family="attention",
    check=_check_varlen_attention_backward,
    fake=_fake_varlen_attention_backward,
    # scores again, then two products for each of them and of their gradients
    flops=lambda grad_out, grad_lse, out, lse, q, k, v, offsets, *rest: (
        2 * _attention_flops(q, k, v, offsets) + _attention_flops(q, k, (*v[:2], 0), offsets)
    ),
)
_VARLEN_ATTENTION = register(
    "varlen_attention",
    family="attention",
    check=_check_varlen_attention,
    fake=_fake_varlen_attention,
    flops=lambda q, k, v, offsets, *rest: _attention_flops(q, k, v, offsets),
    autocast=("q", "k", "v"),
    gradient=Gradient("varlen_attention_backward", _setup_varlen_attention, _backward_varlen_attention),
)
_MERGE_ATTENTION_BACKWARD = register(
    "merge_attention_backward",
    family="attention",
    check=_check_merge_attention_backward,
    fake=lambda grad_out, grad_lse, out_a, lse_a, out_b, lse_b: (
        out_a.new_empty(out_a.shape),
        lse_a.new_empty(lse_a.shape),
        out_a.new_empty(out_a.shape),
        lse_a.new_empty(lse_a.shape),
    ),
    flops=lambda grad_out, grad_lse, out_a, *rest: 6 * out_a[0] * out_a[1] * out_a[2],
)
_MERGE_ATTENTION = register(
    "merge_attention",
    family="attention",
    check=lambda *args: _check_merge("merge_attention", *args),
    fake=lambda out_a, lse_a, out_b, lse_b: (out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)),
    flops=lambda out_a, *rest: 3 * out_a[0] * out_a[1] * out_a[2],
    autocast=("out_a", "out_b"),
    gradient=Gradient("merge_attention_backward", _setup_merge_attention, _backward_merge_attention),
)
