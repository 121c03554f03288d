"""Sample calls of the paragraph-vector step for the contract tests."""

import torch

DOCUMENTS, VOCABULARY = 12, 40
LENGTHS = (5, 0, 1, 17, 3)


def step(
    width: int = 21,
    binary: bool = True,
    update_words: bool = True,
    code: int | None = None,
    context_width: int = 0,
    negatives: int = 7,
    lengths: tuple[int, ...] = LENGTHS,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
):
    """Arguments of a step in the middle of training. Few words, so that tokens meet negatives by accident."""

    def make():
        total = sum(lengths)
        documents = torch.randn(DOCUMENTS, width).to(dtype)
        bits = code or width
        # nobody rounds a value near 0 the same way
        projection = torch.randn(width, bits).to(dtype) * 0.3 if code else None
        context = torch.randn(vocabulary, context_width).to(dtype) if context_width else None
        return (
            documents,
            torch.rand(DOCUMENTS).to(dtype),
            torch.randn(vocabulary, bits + context_width).to(dtype) * 0.5,
            torch.randn(vocabulary).to(dtype),
            torch.rand(vocabulary).to(dtype),
            torch.randperm(DOCUMENTS)[: len(lengths)],
            torch.randint(vocabulary, (total,), dtype=torch.int32),
            torch.tensor((0, *lengths)).cumsum(0).int(),
            torch.randint(vocabulary, (negatives,), dtype=torch.int32),
            torch.randn(vocabulary).to(dtype),
            0.1,
            binary,
            update_words,
            projection,
            torch.rand(width).to(dtype) if code else None,
            context,
            torch.rand(vocabulary).to(dtype) if context_width else None,
            2 if context_width else 0,
        )

    return make


SAMPLES = {
    "paragraph_vector_step": {
        "dbow": step(),
        "real": step(width=32, binary=False),
        "frozen": step(update_words=False),
        "real_binary": step(width=30, code=16),
        "dm": step(context_width=11),
        "one_negative": step(negatives=1, vocabulary=3),
    }
}
