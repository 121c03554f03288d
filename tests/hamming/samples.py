"""Sample calls of the Hamming operators for the contract tests."""

import torch


def candidates(queries: int, count: int, vectors: int) -> torch.Tensor:
    return torch.randint(-1, vectors, (queries, count))


def codes(rows: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, width), dtype=torch.uint8)


SAMPLES = {
    "pack_bits": {
        "float32": lambda: (torch.randn(5, 77),),
        "bfloat16": lambda: (torch.randn(5, 64).bfloat16(),),
        "float16": lambda: (torch.randn(3, 129).half(),),
        "empty": lambda: (torch.randn(0, 16),),
    },
    "hamming_distance": {
        "few": lambda: (codes(3, 13), codes(37, 13)),
        "many": lambda: (codes(9, 48), codes(130, 48)),
        "empty": lambda: (codes(2, 8), codes(0, 8)),
    },
    "hamming_topk": {
        "few": lambda: (codes(2, 13), codes(67, 13), 5, None, None),
        "many": lambda: (codes(9, 48), codes(130, 48), 7, None, None),
        "allowed": lambda: (codes(6, 16), codes(75, 16), 9, codes(1, 10)[0], None),
        "norms": lambda: (codes(2, 16), codes(20, 16), 3, None, torch.arange(20, dtype=torch.int32)),
        "past_the_end": lambda: (codes(2, 16), codes(3, 16), 6, None, None),
    },
    "hamming_range": {
        "few": lambda: (codes(2, 13), codes(67, 13), 50, None),
        "many": lambda: (codes(9, 48), codes(300, 48), 190, None),
        "allowed": lambda: (codes(6, 16), codes(75, 16), 62, codes(1, 10)[0]),
        "all": lambda: (codes(2, 8), codes(20, 8), 65, None),
        "nothing": lambda: (codes(3, 8), codes(20, 8), 0, None),
        "empty": lambda: (codes(2, 8), codes(0, 8), 30, None),
    },
    "rescore_topk": {
        "float32": lambda: (torch.randn(3, 77), candidates(3, 20, 50), torch.randn(50, 77), 7, None),
        "bfloat16": lambda: (
            torch.randn(2, 64).bfloat16(),
            candidates(2, 300, 50),
            torch.randn(50, 64).bfloat16(),
            10,
            None,
        ),
        "float16": lambda: (torch.randn(2, 33), candidates(2, 9, 12), torch.randn(12, 33).half(), 20, None),
        "int8": lambda: (
            torch.randn(3, 40),
            candidates(3, 20, 50),
            torch.randint(-128, 128, (50, 40)).to(torch.int8),
            7,
            torch.rand(40),
        ),
        "bits": lambda: (torch.randn(3, 77).half(), candidates(3, 20, 50), codes(50, 10), 7, None),
        "empty": lambda: (torch.randn(2, 8), candidates(2, 0, 9), torch.randn(9, 8), 3, None),
    },
}
