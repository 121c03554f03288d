"""Public operators: docstrings, checks, shape functions, gradients and the choice of backend."""

from .. import _library as _library
from .anchor_scores import anchor_attention as anchor_attention
from .anchor_scores import anchor_scores as anchor_scores
from .anchor_scores import anchor_topk as anchor_topk
from .attention import merge_attention as merge_attention
from .attention import varlen_attention as varlen_attention
from .backend import use_backend as use_backend
from .hamming import hamming_distance as hamming_distance
from .hamming import hamming_range as hamming_range
from .hamming import hamming_topk as hamming_topk
from .hamming import pack_bits as pack_bits
from .hamming import rescore_topk as rescore_topk
from .latent_attention import geglu_segment_pool as geglu_segment_pool
from .latent_attention import grouped_softmax as grouped_softmax
from .norm import add_layer_norm as add_layer_norm
from .norm import add_rms_norm as add_rms_norm
from .norm import token_prepend as token_prepend
from .norm import token_prepend_rms_norm as token_prepend_rms_norm
from .paragraph_vector import paragraph_vector_step as paragraph_vector_step
from .pooling import cu_seqlens_from_mask as cu_seqlens_from_mask
from .pooling import pack_padded as pack_padded
from .pooling import segment_pool as segment_pool
from .pooling import segment_pool_pack_bits as segment_pool_pack_bits
from .pooling import unpack_padded as unpack_padded
