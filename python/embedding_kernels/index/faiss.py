"""`BinaryIndex` to and from FAISS's binary indexes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from .segments import Snapshot


def _faiss(op: str) -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError(f"{op}: faiss is not installed: pip install faiss-cpu") from error


def to_faiss(snapshot: Snapshot) -> Any:
    """An IndexBinaryFlat of the codes, in an IndexBinaryIDMap2 where ids are not positions."""
    faiss = _faiss("to_faiss")
    if snapshot.dim is None or snapshot.dim % 8:
        raise ValueError(f"to_faiss: FAISS needs a dim that is a multiple of 8, got {snapshot.dim}")
    flat = faiss.IndexBinaryFlat(snapshot.dim)
    ids = snapshot.ids()
    counted = bool((ids == np.arange(len(ids))).all())
    index = flat if counted else faiss.IndexBinaryIDMap2(flat)
    start = 0
    for segment in snapshot.segments:
        for block in segment.blocks("codes", every=False):
            codes = block.numpy()
            if counted:
                index.add(codes)
            else:
                index.add_with_ids(codes, ids[start : start + len(codes)])
            start += len(codes)
    return index


def from_faiss(index: Any) -> tuple[int, np.ndarray, np.ndarray | None]:
    """What a FAISS index holds: dim, codes uint8 ``[N, B]``, and ids, None where they are positions."""
    faiss = _faiss("from_faiss")
    if not isinstance(index, faiss.IndexBinary):
        raise ValueError(f"from_faiss: index must be one of FAISS's binary indexes, got {type(index).__name__}")
    ids = None
    index = faiss.downcast_IndexBinary(index)
    if isinstance(index, (faiss.IndexBinaryIDMap, faiss.IndexBinaryIDMap2)):
        ids = faiss.vector_to_array(index.id_map).astype(np.int64)
        index = faiss.downcast_IndexBinary(index.index)
    if not isinstance(index, faiss.IndexBinaryFlat):
        raise ValueError(
            f"from_faiss: index must be an IndexBinaryFlat, or an id map over one, got {type(index).__name__}"
        )
    codes = faiss.vector_to_array(index.xb).reshape(index.ntotal, index.code_size)
    return int(index.d), codes, ids
