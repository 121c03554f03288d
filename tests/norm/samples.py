"""Sample calls of the norm operators for the contract tests."""

import torch


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def rms(rows=21, dim=37, dtype=torch.float32, residual=True, weight_dtype=None, one_plus_weight=False, eps=1e-6):
    return lambda: (
        drawn(rows, dim, dtype=dtype),
        drawn(rows, dim, dtype=dtype) if residual else None,
        drawn(dim, dtype=weight_dtype or dtype),
        eps,
        one_plus_weight,
    )


def rms_backward(rows=21, dim=37, dtype=torch.float32, summed=True, weight_dtype=None, one_plus_weight=False):
    return lambda: (
        drawn(rows, dim, dtype=dtype),
        drawn(rows, dim, dtype=dtype) if summed else None,
        drawn(rows, dim, dtype=dtype),
        drawn(dim, dtype=weight_dtype or dtype),
        1e-6,
        one_plus_weight,
    )


def layer(rows=21, dim=37, dtype=torch.float32, residual=True, bias=True, weight_dtype=None, eps=1e-5):
    return lambda: (
        drawn(rows, dim, dtype=dtype),
        drawn(rows, dim, dtype=dtype) if residual else None,
        drawn(dim, dtype=weight_dtype or dtype),
        drawn(dim, dtype=weight_dtype or dtype) if bias else None,
        eps,
    )


def layer_backward(rows=21, dim=37, dtype=torch.float32, summed=True, bias=True, weight_dtype=None):
    return lambda: (
        drawn(rows, dim, dtype=dtype),
        drawn(rows, dim, dtype=dtype) if summed else None,
        drawn(rows, dim, dtype=dtype),
        drawn(dim, dtype=weight_dtype or dtype),
        drawn(dim, dtype=weight_dtype or dtype) if bias else None,
        1e-5,
    )


def copies(rows):
    """Sources and targets: two from the last row, which is itself a target; one of a row onto itself; and no more."""
    if rows < 4:
        return torch.arange(0), torch.arange(0)
    return torch.tensor([rows - 1, 1, rows - 1, 2]), torch.tensor([0, rows - 1, rows // 2, 2])


def prepend(rows=21, dim=37, dtype=torch.float32):
    return lambda: (drawn(rows, dim, dtype=dtype), *copies(rows))


def prepend_rms(*sizes, **options):
    def make():
        x, residual, *rest = rms(*sizes, **options)()
        return x, residual, *copies(x.shape[0]), *rest

    return make


def prepend_rms_backward(*sizes, **options):
    def make():
        grad_normed, grad_summed, summed, *rest = rms_backward(*sizes, **options)()
        sources, targets = copies(summed.shape[0])
        return grad_normed, grad_summed, summed.index_copy(0, targets, summed[sources]), sources, targets, *rest

    return make


BF16 = torch.bfloat16

SAMPLES = {
    "add_rms_norm": {
        "plain": rms(),
        "alone": rms(residual=False),
        "one_plus_weight": rms(one_plus_weight=True),
        "wide_weight": rms(dim=64, dtype=BF16, weight_dtype=torch.float32, eps=1e-5),
        "empty": rms(rows=0),
        "one_column": rms(dim=1),
        "defaults": lambda: rms()()[:3],
    },
    "add_rms_norm_backward": {
        "plain": rms_backward(),
        "normed_alone": rms_backward(summed=False, one_plus_weight=True),
        "wide_weight": rms_backward(rows=70, dim=64, dtype=BF16, weight_dtype=torch.float32),
        "empty": rms_backward(rows=0),
        "one_column": rms_backward(dim=1),
    },
    "add_layer_norm": {
        "plain": layer(),
        "alone": layer(residual=False),
        "no_bias": layer(bias=False),
        "wide_weight": layer(dim=64, dtype=BF16, weight_dtype=torch.float32, eps=1e-12),
        "empty": layer(rows=0),
        "one_column": layer(dim=1),
        "defaults": lambda: layer()()[:3],
    },
    "add_layer_norm_backward": {
        "plain": layer_backward(),
        "normed_alone": layer_backward(summed=False, bias=False),
        "wide_weight": layer_backward(rows=70, dim=64, dtype=BF16, weight_dtype=torch.float32),
        "empty": layer_backward(rows=0),
        "one_column": layer_backward(dim=1),
    },
    "token_prepend": {
        "plain": prepend(),
        "narrow": prepend(dim=64, dtype=BF16),
        "no_copies": prepend(rows=3),
        "empty": prepend(rows=0),
        "one_column": prepend(dim=1),
    },
    "token_prepend_backward": {
        "plain": prepend(),
        "narrow": prepend(dim=64, dtype=BF16),
        "no_copies": prepend(rows=3),
        "empty": prepend(rows=0),
    },
    "token_prepend_rms_norm": {
        "plain": prepend_rms(),
        "alone": prepend_rms(residual=False),
        "one_plus_weight": prepend_rms(one_plus_weight=True),
        "wide_weight": prepend_rms(dim=64, dtype=BF16, weight_dtype=torch.float32, eps=1e-5),
        "no_copies": prepend_rms(rows=3),
        "empty": prepend_rms(rows=0),
        "defaults": lambda: prepend_rms()()[:5],
    },
    "token_prepend_rms_norm_backward": {
        "plain": prepend_rms_backward(),
        "normed_alone": prepend_rms_backward(summed=False, one_plus_weight=True),
        "wide_weight": prepend_rms_backward(rows=70, dim=64, dtype=BF16, weight_dtype=torch.float32),
        "no_copies": prepend_rms_backward(rows=3),
        "empty": prepend_rms_backward(rows=0),
    },
}
