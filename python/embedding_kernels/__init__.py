"""Fused kernels for text embedders and rerankers, as torch custom operators.

The package imports without torch (``embedding_kernels.numpy`` needs only NumPy). Where torch has been imported
before it, the operators are registered at once under ``torch.ops.embedding_kernels``; otherwise on first use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it; imported on first use, so that torch is not a cost of `import`
_LAZY = {
    "anchor_attention": ".ops.anchor_scores",
    "anchor_scores": ".ops.anchor_scores",
    "anchor_topk": ".ops.anchor_scores",
    "varlen_attention": ".ops.attention",
    "merge_attention": ".ops.attention",
    "pack_bits": ".ops.hamming",
    "hamming_distance": ".ops.hamming",
    "hamming_topk": ".ops.hamming",
    "hamming_range": ".ops.hamming",
    "rescore_topk": ".ops.hamming",
    "grouped_softmax": ".ops.latent_attention",
    "geglu_segment_pool": ".ops.latent_attention",
    "add_rms_norm": ".ops.norm",
    "add_layer_norm": ".ops.norm",
    "token_prepend": ".ops.norm",
    "token_prepend_rms_norm": ".ops.norm",
    "paragraph_vector_step": ".ops.paragraph_vector",
    "segment_pool": ".ops.pooling",
    "segment_pool_pack_bits": ".ops.pooling",
    "pack_padded": ".ops.pooling",
    "unpack_padded": ".ops.pooling",
    "cu_seqlens_from_mask": ".ops.pooling",
    "use_backend": ".ops.backend",
    "BinaryIndex": ".index",
    "ShardedBinaryIndex": ".index",
    "BinaryParagraphVector": ".models",
    "Embedder": ".models",
    "MultiViewReranker": ".models",
    "TokenPrependingEmbedder": ".models",
}
_SUBMODULES = ("cli", "doctor", "index", "integrations", "models", "nn", "numpy", "ops", "reference")

__all__ = [*_LAZY, "__version__"]

if TYPE_CHECKING:
    from .index import BinaryIndex as BinaryIndex
    from .index import ShardedBinaryIndex as ShardedBinaryIndex
    from .models import BinaryParagraphVector as BinaryParagraphVector
    from .models import Embedder as Embedder
    from .models import MultiViewReranker as MultiViewReranker
    from .models import TokenPrependingEmbedder as TokenPrependingEmbedder
    from .ops.anchor_scores import anchor_attention as anchor_attention
    from .ops.anchor_scores import anchor_scores as anchor_scores
    from .ops.anchor_scores import anchor_topk as anchor_topk
    from .ops.attention import merge_attention as merge_attention
    from .ops.attention import varlen_attention as varlen_attention
    from .ops.backend import use_backend as use_backend
    from .ops.hamming import hamming_distance as hamming_distance
    from .ops.hamming import hamming_range as hamming_range
    from .ops.hamming import hamming_topk as hamming_topk
    from .ops.hamming import pack_bits as pack_bits
    from .ops.hamming import rescore_topk as rescore_topk
    from .ops.latent_attention import geglu_segment_pool as geglu_segment_pool
    from .ops.latent_attention import grouped_softmax as grouped_softmax
    from .ops.norm import add_layer_norm as add_layer_norm
    from .ops.norm import add_rms_norm as add_rms_norm
    from .ops.norm import token_prepend as token_prepend
    from .ops.norm import token_prepend_rms_norm as token_prepend_rms_norm
    from .ops.paragraph_vector import paragraph_vector_step as paragraph_vector_step
    from .ops.pooling import cu_seqlens_from_mask as cu_seqlens_from_mask
    from .ops.pooling import pack_padded as pack_padded
    from .ops.pooling import segment_pool as segment_pool
    from .ops.pooling import segment_pool_pack_bits as segment_pool_pack_bits
    from .ops.pooling import unpack_padded as unpack_padded


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name], __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBMODULES})


if sys.modules.get("torch") is not None:
    from . import ops as ops
