"""Models of real shapes with random weights, and texts of made-up words: for machines that hold no model.

Time depends on shapes and lengths alone. Words are tokens, so the tokenizer costs less than a model's own would.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

#: a natural logarithm's standard deviation; passages of a corpus spread about so
_SPREAD = 0.6
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def lengths(count: int, mean: int, longest: int, seed: int = 0) -> np.ndarray:
    """Words of texts: log-normal, none above ``longest``."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, count)
    return np.clip(drawn.round(), 4, longest).astype(int)


def texts(words: Sequence[int], vocabulary: int, seed: int = 0) -> list[str]:
    """Texts of so many words each, drawn evenly."""
    ends = np.cumsum([0, *words])
    drawn = np.random.default_rng(seed).integers(vocabulary // 2, vocabulary, ends[-1])
    return [" ".join(f"w{word}" for word in drawn[first:last]) for first, last in pairwise(ends)]


@cache
def tokenizer(vocabulary: int, form: str, sentinels: int = 0, longest: int = 512) -> Any:
    """A word a token. ``form``: where the special tokens go, as "[CLS] $A [SEP]"."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from embedding_kernels.models.sentence_prompts import PROMPTS

    prompts = " ".join(text for several in PROMPTS.values() for text in several)
    known = [*_SPECIAL, *sorted(set(re.findall(r"\w+|[^\w\s]+", prompts + " Query: Context: |")))]
    known += [f"w{place}" for place in range(len(known), vocabulary - sentinels)]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(known)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(name, _SPECIAL.index(name)) for name in ("[CLS]", "[SEP]") if name in form]
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        padding_side="right", model_max_length=longest,
    )  # fmt: skip
    if sentinels:
        made.add_special_tokens({"additional_special_tokens": [f"<extra_id_{place}>" for place in range(sentinels)]})
    return made


def model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Seeded weights, drawn on the device."""
    from transformers import AutoModel

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def in_float32(of: Any) -> Any:
    """A copy that computes in float32, for what answers are held against."""
    return copy.deepcopy(of).float().eval()


def near(exact: np.ndarray, count: int, dtype: torch.dtype) -> Callable[[Any], None]:
    """Verifies ``count`` vectors by the first of them: float32 by coordinate, else by their angle.

    Eight layers' roundings of bfloat16 come to 1 - cosine = 0.0001; token prepending not done, to 0.01.
    """
    exact, allowed = np.asarray(exact, dtype=np.float64), torch.finfo(dtype).eps / 8

    def verify(answer: Any) -> None:
        assert answer.shape == (count, exact.shape[1]), f"shape {answer.shape}, expected {(count, exact.shape[1])}"
        first = np.asarray(answer[: len(exact)], dtype=np.float64)
        scale = np.linalg.norm(exact, axis=1)
        if dtype == torch.float32:
            worst = float((np.abs(first - exact) / scale[:, None]).max())
            assert worst <= 1e-5, f"a coordinate differs by {worst:.3g} of its vector's length from float32's"
        else:
            least = float(((first * exact).sum(1) / (np.linalg.norm(first, axis=1) * scale)).min())
            assert least >= 1 - allowed, f"a vector has cosine {least:.5f} with that of float32, allowed {1 - allowed}"

    return verify
