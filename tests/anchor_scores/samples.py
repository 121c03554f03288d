"""Sample calls of the anchor scores operators for the contract tests."""

import torch

PASSAGES = (3, 0, 37, 1)
BF16 = torch.bfloat16


def _parts(lengths, views, dim, dtype):
    cu_passages = torch.tensor((0, *lengths)).cumsum(0).int()
    return torch.randn(sum(lengths), views, dim).to(dtype), cu_passages


def attention(lengths=PASSAGES, views=3, heads=5, dim=21, dtype=torch.float32):
    def make():
        own, cu_passages = _parts(lengths, views, dim, dtype)
        return own, (torch.randn(len(lengths), views, heads, dim) / max(dim, 1) ** 0.5).to(dtype), cu_passages

    return make


def attention_backward(**options):
    def make():
        own, queries, cu_passages = attention(**options)()
        return torch.randn(queries.shape).to(own.dtype), own, queries, cu_passages

    return make


def scores(lengths=PASSAGES, views=3, dim=21, dtype=torch.float32, per_view=False):
    def make():
        own, cu_passages = _parts(lengths, views, dim, dtype)
        return own, torch.randn(len(lengths), views, dim).to(dtype), cu_passages, per_view

    return make


def scores_backward(**options):
    def make():
        own, anchors, cu_passages, per_view = scores(**options)()
        return torch.randn(own.shape[: 1 + per_view]), own, anchors, cu_passages, per_view

    return make


def topk(k=4, **options):
    return lambda: (*scores(**options)()[:3], k)


SAMPLES = {
    "anchor_attention": {
        "plain": attention(),
        "narrow": attention(dtype=BF16, dim=48, heads=8),
        "one_of_each": attention(lengths=(1,), views=1, heads=1, dim=1),
        "many_passages": attention(lengths=(300, 2), views=2, heads=12, dim=16),
        "all_empty": attention(lengths=(0, 0)),
        "no_queries": attention(lengths=()),
    },
    "anchor_attention_backward": {
        "plain": attention_backward(),
        "narrow": attention_backward(dtype=BF16, dim=48, heads=8),
        "many_passages": attention_backward(lengths=(300, 2), views=2, heads=12, dim=16),
        "all_empty": attention_backward(lengths=(0, 0)),
        "no_queries": attention_backward(lengths=()),
    },
    "anchor_scores": {
        "plain": scores(),
        "per_view": scores(per_view=True),
        "narrow": scores(dtype=BF16, dim=48),
        "many_passages": scores(lengths=(300, 2), views=2, dim=16),
        "all_empty": scores(lengths=(0, 0)),
        "no_queries": scores(lengths=()),
        "defaults": lambda: scores()()[:3],
    },
    "anchor_scores_backward": {
        "plain": scores_backward(),
        "per_view": scores_backward(per_view=True),
        "narrow": scores_backward(dtype=BF16, dim=48),
        "all_empty": scores_backward(lengths=(0, 0)),
        "no_queries": scores_backward(lengths=()),
    },
    "anchor_topk": {
        "plain": topk(),
        "one": topk(k=1),
        "more_than_there_are": topk(k=50, dtype=BF16),
        "many_passages": topk(k=20, lengths=(300, 2), views=2, dim=16),
        "all_empty": topk(lengths=(0, 0)),
        "no_queries": topk(lengths=()),
    },
}
