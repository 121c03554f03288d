"""The definition of every operator in plain torch, at any float dtype: what the kernels are checked against."""

from . import attention as attention
from . import hamming as hamming
from . import latent_attention as latent_attention
from . import norm as norm
from . import paragraph_vector as paragraph_vector
from . import pooling as pooling
from .attention import merge_attention as merge_attention
from .attention import varlen_attention as varlen_attention
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
from .pooling import pack_padded as pack_padded
from .pooling import segment_pool as segment_pool
from .pooling import segment_pool_pack_bits as segment_pool_pack_bits
from .pooling import unpack_padded as unpack_padded
