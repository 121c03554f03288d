"""Sample calls of the Hamming operators for the contract tests."""

import torch


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
}
