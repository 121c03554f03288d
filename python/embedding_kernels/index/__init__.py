"""Exact search over binary codes: one index, or one spread over processes."""

from .binary import BinaryIndex as BinaryIndex
from .sharded import ShardedBinaryIndex as ShardedBinaryIndex
