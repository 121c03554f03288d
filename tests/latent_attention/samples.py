"""Sample calls of the latent attention operators for the contract tests."""

import torch

CU_SEQLENS = torch.tensor([0, 3, 3, 20, 61], dtype=torch.int32)
TOTAL = 61
BF16 = torch.bfloat16


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def softmax(rows=21, groups=4, size=9, dtype=torch.float32):
    return lambda: (drawn(rows, groups * size, dtype=dtype), groups)


def softmax_backward(rows=21, groups=4, size=9, dtype=torch.float32):
    def make():
        probabilities = torch.softmax(drawn(rows, groups, size), -1).flatten(1).to(dtype)
        return drawn(rows, groups * size, dtype=dtype), probabilities, groups

    return make


def pool(
    columns=37, dtype=torch.float32, bias=True, bias_dtype=None, weighted=True, out_dtype=None, offsets=CU_SEQLENS
):
    def make():
        total = int(offsets[-1])
        hidden = drawn(total, 2 * columns, dtype=dtype)
        vector = drawn(2 * columns, dtype=bias_dtype or dtype) if bias else None
        return hidden, vector, offsets.clone(), torch.rand(total) if weighted else None, out_dtype

    return make


def pool_backward(**options):
    def make():
        hidden, bias, offsets, weights, out_dtype = pool(**options)()
        grad = drawn(offsets.shape[0] - 1, hidden.shape[1] // 2, dtype=out_dtype or hidden.dtype)
        return grad, hidden, bias, offsets, weights

    return make


NONE = torch.zeros(1, dtype=torch.int32)
EMPTY = torch.zeros(4, dtype=torch.int32)

SAMPLES = {
    "grouped_softmax": {
        "plain": softmax(),
        "one_group": softmax(groups=1, size=37),
        "groups_of_one": softmax(groups=7, size=1),
        "narrow": softmax(groups=2, size=70, dtype=BF16),
        "empty": softmax(rows=0),
    },
    "grouped_softmax_backward": {
        "plain": softmax_backward(),
        "one_group": softmax_backward(groups=1, size=37),
        "groups_of_one": softmax_backward(groups=7, size=1),
        "narrow": softmax_backward(groups=2, size=70, dtype=BF16),
        "empty": softmax_backward(rows=0),
    },
    "geglu_segment_pool": {
        "plain": pool(),
        "no_bias": pool(bias=False),
        "no_weights": pool(columns=600, weighted=False),
        "wide_bias": pool(dtype=BF16, bias_dtype=torch.float32, out_dtype=torch.float32),
        "one_column": pool(columns=1, out_dtype=torch.float16),
        "all_empty": pool(offsets=EMPTY),
        "no_sequences": pool(offsets=NONE),
        "defaults": lambda: pool()()[:3],
    },
    "geglu_segment_pool_backward": {
        "plain": pool_backward(),
        "no_bias": pool_backward(bias=False),
        "no_weights": pool_backward(columns=600, weighted=False),
        "wide_bias": pool_backward(dtype=BF16, bias_dtype=torch.float32, out_dtype=torch.float32),
        "one_column": pool_backward(columns=1, out_dtype=torch.float16),
        "all_empty": pool_backward(offsets=EMPTY),
        "no_sequences": pool_backward(offsets=NONE),
    },
}
