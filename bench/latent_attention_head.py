"""NV-Embed's pooling head at its real size, folded, beside the same algebra in plain torch and the published module."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from embedding_kernels.nn import LatentAttentionPooling

from . import ceilings
from .harness import OURS, Case, Contender, Room, Work, compiled, copies

FOLDED = "plain torch, folded"
PUBLISHED = "published, padded"
COMPILED = "published, padded, compiled"


@dataclass(frozen=True)
class Size:
    """NV-Embed's, if nothing else is said."""

    width: int = 4096
    latents: int = 512
    heads: int = 8
    head_dim: int = 4096

    @property
    def folded(self) -> int:
        return self.heads * self.latents

    @property
    def inner(self) -> int:
        return 4 * self.width


_REAL, _SMALL = Size(), Size(64, 16, 2, 32)


@cache
def _head(dtype: torch.dtype, device: torch.device, size: Size = _REAL) -> LatentAttentionPooling:
    """Seeded weights of a size that keeps every layer's output near 1."""
    with torch.device("meta"):
        head = LatentAttentionPooling(size.width, size.latents, size.heads, size.head_dim)
    seeded = torch.Generator(device).manual_seed(0)
    state = {}
    for name, tensor in head.state_dict().items():
        values = torch.randn(tensor.shape, generator=seeded, device=device)
        state[name] = (values if name == "latents" else values / math.sqrt(tensor.shape[-1])).to(dtype)
    head.load_state_dict(state, assign=True)
    return head


# ---- the peers ----


def _mean(rows: Tensor, lengths: Tensor) -> Tensor:
    texts = torch.repeat_interleave(lengths)
    sums = rows.new_zeros(len(lengths), rows.shape[1], dtype=torch.float32).index_add_(0, texts, rows.float())
    return sums / lengths[:, None]


def _plain_folded(head: LatentAttentionPooling, folded: tuple[Tensor, Tensor], x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The folded algebra, the last linear layer behind the mean, in torch's own operators and all tokens at once."""
    attention, feed_forward = head.cross_attend_blocks
    up, down = feed_forward.fn.net["0"], feed_forward.fn.net["2"]
    scores, mix = folded
    probabilities = functional.linear(attention.norm(x), scores).unflatten(1, (head.heads, -1)).softmax(-1)
    y = x + functional.linear(probabilities.flatten(1), mix)
    value, gate = up(feed_forward.norm(y)).chunk(2, -1)
    lengths = cu_seqlens.diff()
    gated = _mean(value * functional.gelu(gate), lengths).to(x.dtype)
    return functional.normalize(down(gated).float() + _mean(y, lengths), dim=-1)


def _published(head: LatentAttentionPooling, x: Tensor, mask: Tensor) -> Tensor:
    """As in the released code: the latents repeated over the batch before their projection."""
    attention, feed_forward = head.cross_attend_blocks
    layers = attention.fn
    latents = head.latents.expand(len(x), -1, -1)
    query = layers.to_q(attention.norm(x))
    key, value = layers.to_kv(attention.norm_context(latents)).chunk(2, -1)
    query, key, value = (part.unflatten(-1, (head.heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value)
    y = layers.to_out(mixed.transpose(1, 2).flatten(2)) + x
    part, gate = feed_forward.fn.net["0"](feed_forward.norm(y)).chunk(2, -1)
    z = feed_forward.fn.net["2"](part * functional.gelu(gate)) + y
    weights = mask[..., None].float()
    return functional.normalize((z * weights).sum(1) / weights.sum(1), dim=-1)


# ---- cases ----


def _lengths(sequences: int, longest: int) -> list[int]:
    """Uneven, the longest among them."""
    drawn = np.random.default_rng(0).integers(longest // 4, longest, sequences)
    return [longest, *drawn[1:].tolist()]


def _padded(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    batch = torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
    return batch, torch.arange(max(lengths), device=x.device) < torch.tensor(lengths, device=x.device)[:, None]


def _verifier(exact: Tensor, dtype: torch.dtype, roundings: float = 4) -> Callable[[Any], None]:
    """Unit vectors: in float32 every coordinate, in bfloat16 the cosine, which a head's dozen roundings may lower."""

    def verify(vectors: Tensor) -> None:
        assert vectors.shape == exact.shape, f"shape {tuple(vectors.shape)}, expected {tuple(exact.shape)}"
        if dtype == torch.float32:
            worst = float((vectors - exact).abs().max())
            assert worst <= 1e-6, f"a coordinate differs by {worst:.3g} from the published head's"
            return
        cosine = float((vectors.double() * exact.double()).sum(1).min())
        assert cosine >= 1 - roundings * torch.finfo(dtype).eps, f"cosine {cosine:.7f} with the plain head's vectors"

    return verify


def _gradient_verifier(vectors: Tensor, gradient: Tensor, dtype: torch.dtype) -> Callable[[Any], None]:
    """The vectors and, by its direction, the gradient of the hidden states."""
    verify_vectors, exact = _verifier(vectors, dtype), gradient.double().flatten()

    def verify(answer: tuple[Tensor, Tensor]) -> None:
        verify_vectors(answer[0])
        cosine = float(torch.cosine_similarity(answer[1].double().flatten(), exact, 0))
        assert cosine >= 1 - 4 * torch.finfo(dtype).eps, f"gradient has cosine {cosine:.7f} with plain torch's"

    return verify


def _exact(dtype: torch.dtype, x: Tensor, lengths: list[int], cu_seqlens: Tensor) -> Tensor:
    with torch.no_grad():
        head = _head(dtype, x.device)
        if dtype == torch.float32:
            return _published(head, *_padded(x, lengths))
        return _plain_folded(head, head._fold(), x, cu_seqlens)


def _build(sequences: int, longest: int, dtype: torch.dtype, published: bool, room: Room) -> list[Contender]:
    head, lengths = _head(dtype, room.device), _lengths(sequences, longest)
    seeded = torch.Generator().manual_seed(1)
    rows = copies(torch.randn(sum(lengths), _REAL.width, generator=seeded).to(room.device, dtype), room, most=4)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=room.device)
    verify = _verifier(_exact(dtype, rows[0], lengths, cu_seqlens), dtype)
    ours = head.fold()
    with torch.no_grad():
        folded = head._fold()

    def call(run: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor]:
        def inferred(turn: int) -> Tensor:
            with torch.inference_mode():
                return run(rows[turn % len(rows)])

        return inferred

    contenders = [
        Contender(OURS, call(lambda x: ours(x, cu_seqlens)), verify, role="ours"),
        Contender(FOLDED, call(lambda x: _plain_folded(head, folded, x, cu_seqlens)), verify),
    ]
    if published:
        contenders.append(Contender(PUBLISHED, call(lambda x: _published(head, *_padded(x, lengths))), verify))
    return [*contenders, ceilings.matmul(room, dtype)]


def _build_training(sequences: int, longest: int, dtype: torch.dtype, room: Room) -> list[Contender]:
    """A step's forward and backward, in which both fold anew; gradients of the hidden states and every parameter."""
    head, lengths = _head(dtype, room.device), _lengths(sequences, longest)
    seeded = torch.Generator().manual_seed(1)
    x = torch.randn(sum(lengths), _REAL.width, generator=seeded).to(room.device, dtype).requires_grad_()
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=room.device)
    grad = torch.randn(sequences, _REAL.width, generator=seeded).to(room.device)
    leaves = [x, *head.parameters()]

    def call(run: Callable[[], Tensor]) -> Callable[[int], tuple[Tensor, ...]]:
        def both(turn: int) -> tuple[Tensor, ...]:
            out = run()
            return out.detach(), *torch.autograd.grad(out, leaves, grad)[:1]

        return both

    ours, plain = call(lambda: head(x, cu_seqlens)), call(lambda: _plain_folded(head, head._fold(), x, cu_seqlens))
    vectors, gradient = plain(0)
    verify = _gradient_verifier(vectors, gradient, dtype)
    return [
        Contender(OURS, ours, verify, role="ours", note="forms each block again in the backward pass"),
        Contender(FOLDED, plain, verify, note="keeps every activation"),
        ceilings.matmul(room, dtype),
    ]


def _work(tokens: int, sequences: int, dtype: torch.dtype, unit: str, size: Size = _REAL) -> Work:
    weights = 2 * size.width * size.folded + 2 * size.width * size.inner
    operations = 2 * tokens * weights + 2 * sequences * size.width * size.inner
    return Work((weights + size.width * size.inner) * dtype.itemsize, operations, unit)


def _case(sequences: int, longest: int, dtype: torch.dtype, published: bool = False, training: bool = False) -> Case:
    kind, tokens = str(dtype).removeprefix("torch."), sum(_lengths(sequences, longest))
    step = "forward+backward" if training else "forward"
    build = (
        partial(_build_training, sequences, longest, dtype)
        if training
        else partial(_build, sequences, longest, dtype, published)
    )
    return Case(
        "latent_attention_head",
        f"{sequences} texts, {tokens} tokens {kind} {step}",
        {"sequences": sequences, "longest": longest, "tokens": tokens, "dtype": kind, "pass": step},
        (FOLDED, *([PUBLISHED] if published else [])),
        build,
        _work(tokens, sequences, dtype, f"{kind} operations"),
        {} if training else {FOLDED: 1.25 if dtype == torch.float32 else 1.05},
    )


# ---- at a size of a GPU ----

_CHECKED = 3  # texts whose vectors are held against the published head's in float32


def _full(sequences: int, longest: int, even: bool) -> list[int]:
    return [longest] * sequences if even else _lengths(sequences, longest)


def _build_batch(
    size: Size, sequences: int, longest: int, even: bool, dtype: torch.dtype, room: Room
) -> list[Contender]:
    """A batch as a model hands it over: packed to ours, padded to the published head."""
    head, lengths = _head(dtype, room.device, size), _full(sequences, longest, even)
    seeded = torch.Generator(room.device).manual_seed(1)
    tokens = torch.randn(sum(lengths), size.width, generator=seeded, device=room.device).to(dtype)
    rows = copies(tokens, room, most=4)
    batches = [_padded(x, lengths) for x in rows]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=room.device)
    first = lengths[:_CHECKED]
    with torch.inference_mode():
        exact = _published(_float32(size, dtype, room.device), *_padded(rows[0][: sum(first)].float(), first))
    verify_first = _verifier(exact, dtype, 1 / 8)

    def verify(vectors: Tensor) -> None:
        assert vectors.shape == (sequences, size.width), f"shape {tuple(vectors.shape)}"
        verify_first(vectors[: len(exact)].float())

    ours, quick = head.fold(), compiled(partial(_published, head))

    def call(run: Callable[..., Tensor], batches: list[tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
        def inferred(turn: int) -> Tensor:
            with torch.inference_mode():
                return run(*batches[turn % len(batches)])

        return inferred

    return [
        Contender(OURS, call(ours, [(x, cu_seqlens) for x in rows]), verify, role="ours"),
        Contender(PUBLISHED, call(partial(_published, head), batches), verify),
        Contender(COMPILED, call(quick, batches), verify),
        ceilings.matmul(room, dtype),
    ]


def _float32(size: Size, dtype: torch.dtype, device: torch.device) -> LatentAttentionPooling:
    """The same weights, computing in float32."""
    return copy.deepcopy(_head(dtype, device, size)).float()


def _made(size: Size, sequences: int, longest: int, even: bool, dtype: torch.dtype) -> Case:
    kind, tokens = str(dtype).removeprefix("torch."), sum(_full(sequences, longest, even))
    filled = f"of {longest} tokens" if even else f"of up to {longest}, {tokens} tokens"
    return Case(
        "latent_attention_head",
        f"{sequences} texts {filled}, width {size.width} {kind} forward",
        {"sequences": sequences, "longest": longest, "tokens": tokens, "dtype": kind, "width": size.width},
        (PUBLISHED, COMPILED),
        partial(_build_batch, size, sequences, longest, even, dtype),
        _work(tokens, sequences, dtype, f"{kind} operations", size),
    )


def _gpu_case(even: bool) -> Case:
    small = _made(_SMALL, 5, 24, even, torch.float32)
    return replace(_made(_REAL, 64, 512, even, torch.bfloat16), where="cuda", small=small, patience=2.0)


_F32, _BF16 = torch.float32, torch.bfloat16

BENCHMARKS: dict[str, list[Case]] = {
    "latent_attention_head": [
        *(_gpu_case(even) for even in (True, False)),
        _case(2, 32, _BF16, published=True),
        _case(8, 32, _BF16),
        _case(4, 512, _BF16, published=True),
        _case(4, 512, _BF16, training=True),
        replace(_case(2, 32, _F32, published=True), where="cpu"),
        replace(_case(8, 32, _F32), where="cpu"),
        replace(_case(4, 512, _F32), where="cpu"),
    ]
}
