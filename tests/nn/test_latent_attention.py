"""The folded latent-attention head against the published one: values and gradients, at small odd sizes and the real."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from embedding_kernels.nn import LatentAttentionPooling
from nn.published_head import published_head

SIZES = [(24, 7, 3, 5), (33, 1, 1, 33), (40, 17, 2, 64)]
LENGTHS = [3, 11, 1, 6]


def made_head(sizes: tuple[int, int, int, int], token_block: int = 1024) -> LatentAttentionPooling:
    """Random weights everywhere: fresh norms and biases would hide a forgotten one."""
    torch.manual_seed(0)
    head = LatentAttentionPooling(*sizes, token_block=token_block)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith(
                ("norm.weight", "norm.bias", "norm_context.weight", "norm_context.bias", "0.bias", "2.bias")
            ):
                parameter += 0.2 * torch.randn_like(parameter)
    return head


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def published(head: LatentAttentionPooling, x: Tensor, lengths: list[int], **options: Tensor) -> Tensor:
    return published_head(x, lengths, dict(head.named_parameters()), head.heads, **options)


def values_and_gradients(run, head: LatentAttentionPooling, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = run(head, x)
    names = ["x", *(name for name, _ in head.named_parameters())]
    found = torch.autograd.grad(out, [x, *head.parameters()], grad.to(out.dtype))
    return {"out": out.detach(), **dict(zip(names, found, strict=True))}


def worst(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).abs().max())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("token_block", [1024, 4])
def test_folded_is_published_in_float64(sizes, token_block):
    head = made_head(sizes, token_block).double()
    x, grad = torch.randn(sum(LENGTHS), sizes[0]).double(), torch.randn(len(LENGTHS), sizes[0]).double()
    ours = values_and_gradients(lambda h, x: h(x, offsets(LENGTHS)), head, x, grad)
    theirs = values_and_gradients(lambda h, x: published(h, x, LENGTHS), head, x, grad)
    for name, exact in theirs.items():
        assert worst(ours[name], exact) <= 1e-12 * max(1.0, float(exact.abs().max())), name
    folded = head.fold()(x, offsets(LENGTHS))
    assert worst(folded, theirs["out"]) <= 1e-12


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("token_block", [1024, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_the_published_head(sizes, token_block, dtype):
    """DESIGN's rule, the floor being two roundings of the largest exact value."""
    head = made_head(sizes, token_block).to(dtype)
    x, grad = torch.randn(sum(LENGTHS), sizes[0]).to(dtype), torch.randn(len(LENGTHS), sizes[0])
    ours = values_and_gradients(lambda h, x: h(x, offsets(LENGTHS)), head, x, grad)
    plain = values_and_gradients(lambda h, x: published(h, x, LENGTHS), head, x, grad)
    with torch.no_grad():
        ours["folded"] = head.fold()(x, offsets(LENGTHS))
    wide = made_head(sizes).double()
    wide.load_state_dict(head.state_dict())
    exact = values_and_gradients(lambda h, x: published(h, x, LENGTHS), wide, x.double(), grad)
    exact["folded"], plain["folded"] = exact["out"], plain["out"]
    for name, value in exact.items():
        floor = torch.finfo(dtype).eps * float(value.abs().max())
        assert worst(ours[name], value) <= 2 * worst(plain[name], value) + floor, name


def test_default_sizes_are_those_of_the_released_checkpoint():
    with torch.device("meta"):
        head = LatentAttentionPooling()
    assert sum(parameter.numel() for parameter in head.parameters()) == 740_356_096
    assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == {
        "latents": (512, 4096),
        "cross_attend_blocks.0.fn.to_q.weight": (32768, 4096),
        "cross_attend_blocks.0.fn.to_kv.weight": (65536, 4096),
        "cross_attend_blocks.0.fn.to_out.weight": (4096, 32768),
        "cross_attend_blocks.0.norm.weight": (4096,),
        "cross_attend_blocks.0.norm.bias": (4096,),
        "cross_attend_blocks.0.norm_context.weight": (4096,),
        "cross_attend_blocks.0.norm_context.bias": (4096,),
        "cross_attend_blocks.1.fn.net.0.weight": (32768, 4096),
        "cross_attend_blocks.1.fn.net.0.bias": (32768,),
        "cross_attend_blocks.1.fn.net.2.weight": (4096, 16384),
        "cross_attend_blocks.1.fn.net.2.bias": (4096,),
        "cross_attend_blocks.1.norm.weight": (4096,),
        "cross_attend_blocks.1.norm.bias": (4096,),
    }


@pytest.mark.parametrize("token_block", [1024, 4])
@pytest.mark.parametrize("folded", [False, True])
def test_masks_and_empty_sequences(token_block, folded):
    head = made_head(SIZES[0], token_block)
    lengths = [0, 5, 9, 0, 2]
    x, mask = torch.randn(16, 24), torch.ones(16)
    mask[:3] = 0
    mask[14:] = 0  # a whole sequence
    with torch.no_grad():
        found = (head.fold() if folded else head)(x, offsets(lengths), weights=mask)
        expected = published(head, x[:14], [5, 9], mask=mask[:14])
    assert not found[[0, 3, 4]].any()
    torch.testing.assert_close(found[1:3], expected, rtol=1e-5, atol=1e-6)


def test_weighted_gradient_of_cut_sequences_is_that_of_whole_ones():
    x, weights, grad = torch.randn(21, 24), torch.rand(21), torch.randn(len(LENGTHS), 24)
    found = [
        values_and_gradients(
            lambda h, x: h(x, offsets(LENGTHS), weights=weights, normalize=False), made_head(SIZES[0], block), x, grad
        )
        for block in (1024, 4)
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("token_block", [1024, 4])
def test_no_tokens_and_no_sequences(token_block):
    head = made_head(SIZES[0], token_block)
    assert head.fold()(torch.randn(0, 24), offsets([])).shape == (0, 24)
    x = torch.randn(0, 24, requires_grad=True)
    out = head(x, offsets([0, 0]))
    assert out.shape == (2, 24) and not out.any()
    out.sum().backward()


def test_only_what_is_asked_for_gets_a_gradient():
    head = made_head(SIZES[0], 4).requires_grad_(False)
    head.cross_attend_blocks[1].fn.net["0"].weight.requires_grad_(True)
    x = torch.randn(21, 24)
    head(x, offsets(LENGTHS)).square().sum().backward()
    given = [name for name, parameter in head.named_parameters() if parameter.grad is not None]
    assert given == ["cross_attend_blocks.1.fn.net.0.weight"]
    x.requires_grad_()
    made_head(SIZES[0], 4).fold()(x, offsets(LENGTHS)).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_block_bounds_the_memory_of_forward_and_backward(monkeypatch):
    """Nothing as wide as the feed-forward layer is held for more than a block of tokens."""
    head, tokens = made_head((16, 4, 2, 8), token_block=32), 640
    seen: list[int] = []

    class Rows(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == 128:
                    seen.append(tensor.shape[0])
            return out

    x = torch.randn(tokens, 16, requires_grad=True)
    with Rows():
        head(x, offsets([400, 40, 200])).square().sum().backward()
    assert seen and max(seen) <= 32


def test_bad_input_is_named():
    head, x = made_head(SIZES[0]), torch.randn(4, 24)
    with pytest.raises(ValueError, match=r"hidden must be float32 \[tokens, 24\], got float32 \[4, 23\]"):
        head(x[:, :23], offsets([4]))
    with pytest.raises(ValueError, match=r"hidden must be float32 .* got bfloat16"):
        head(x.bfloat16(), offsets([4]))
    with pytest.raises(ValueError, match="weights must not require a gradient"):
        head(x, offsets([4]), weights=torch.ones(4, requires_grad=True))
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        LatentAttentionPooling(8, 2, 0, 4)
    for run in (head, head.fold()):
        with pytest.raises(ValueError, match="cu_seqlens must be 4 in its last place"):
            run(x, offsets([3]))


def test_second_derivatives_are_refused():
    head, x = made_head(SIZES[0]), torch.randn(21, 24, requires_grad=True)
    grad = torch.autograd.grad(head(x, offsets(LENGTHS)).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_fold_under_inference_mode_serves_later_training():
    head, x = made_head(SIZES[0]), torch.randn(21, 24)
    with torch.inference_mode():
        folded = head.fold()
        first = folded(x, offsets(LENGTHS))
    wanting = x.clone().requires_grad_()
    again = folded(wanting, offsets(LENGTHS))
    again.sum().backward()
    torch.testing.assert_close(again.detach(), first.clone(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_real_size():
    """512 latents, 8 heads of 4096, width 4096: values by the rule, and float64 equality of the fold."""
    lengths = [5, 30, 1]
    with torch.device("meta"):
        head = LatentAttentionPooling()
    torch.manual_seed(0)
    # drawn in the narrowest dtype, whose values are the same in all: one exact result serves every dtype
    state = {
        name: torch.randn(tensor.shape, dtype=torch.bfloat16).div_(1 if tensor.dim() == 1 else tensor.shape[-1] ** 0.5)
        for name, tensor in head.state_dict().items()
    }
    state["latents"] *= 64  # as initialised: of variance 1
    head.load_state_dict(state, assign=True)
    del state
    x = torch.randn(sum(lengths), 4096, dtype=torch.bfloat16)
    runs = {}
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            head, x = head.to(dtype), x.to(dtype)
            runs[dtype] = published(head, x, lengths), head.fold()(x, offsets(lengths))
        head, x = head.double(), x.double()
        exact = published(head, x, lengths)
        assert worst(head.fold()(x, offsets(lengths)), exact) <= 1e-12
    for dtype, (plain, found) in runs.items():
        floor = torch.finfo(dtype).eps * float(exact.abs().max())
        assert worst(found, exact) <= 2 * worst(plain, exact) + floor, dtype
