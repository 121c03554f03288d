"""What the arguments of an index must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGEST_ID = 2**63 - 1


def check_array(op: str, argument: str, array: Any) -> str:
    """Refuse what is neither float vectors nor uint8 codes; returns the name of the dtype."""
    if not isinstance(array, (np.ndarray, Tensor)):
        raise ValueError(f"{op}: {argument} must be a NumPy array or a tensor, got {type(array).__name__}")
    if array.ndim != 2:
        raise ValueError(f"{op}: {argument} must have 2 dimensions, got shape {list(array.shape)}")
    kind = str(array.dtype).removeprefix("torch.")
    if kind not in ("uint8", "float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"{op}: {argument} must be float vectors or uint8 codes, got {kind}")
    return kind


def check_width(op: str, argument: str, array: np.ndarray | Tensor, kind: str, dim: int) -> None:
    """Refuse vectors or codes that are not as wide as ``dim`` bits."""
    width = (dim + 7) // 8 if kind == "uint8" else dim
    if array.shape[1] != width:
        what = f"codes of {width} bytes" if kind == "uint8" else f"vectors of {dim} dimensions"
        raise ValueError(f"{op}: {argument} must be {what}, got shape {list(array.shape)}")


def check_integer(op: str, argument: str, value: Any, least: int = 1) -> int:
    """Refuse what is no integer of at least ``least``; returns it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{op}: {argument} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_ids(op: str, argument: str, ids: Any) -> np.ndarray:
    """Refuse what is not a row of integers; returns them as int64 on the CPU."""
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"{op}: {argument} must have 1 dimension, got shape {list(array.shape)}")
    if array.dtype.kind not in "iu" and (len(array) or isinstance(ids, (np.ndarray, Tensor))):
        raise ValueError(f"{op}: {argument} must be integers, got {array.dtype}")
    if array.dtype == np.uint64 and len(array) and int(array.max()) > _LARGEST_ID:
        raise ValueError(f"{op}: {argument} must be below 2**63, got {int(array.max())}")
    return np.ascontiguousarray(array, dtype=np.int64)


def check_new_ids(ids: Any, count: int) -> np.ndarray:
    """Refuse ids that cannot name ``count`` new rows; returns them as int64."""
    array = check_ids("add", "ids", ids)
    if len(array) != count:
        raise ValueError(f"add: ids must be one for each of the {count} vectors, got {len(array)}")
    if count and int(array.min()) < 0:
        raise ValueError(f"add: ids must be at least 0 (-1 marks a missing answer), got {int(array.min())}")
    ordered = np.sort(array)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"add: ids must differ from each other, got {int(twice[0])} twice")
    return array


def check_scale(scale: Any, dim: int | None, kept: str | None) -> Tensor | None:
    """Refuse an int8 scale that does not fit; returns it as float32 on the CPU."""
    if scale is None:
        return None
    if kept != "int8":
        raise ValueError(f"BinaryIndex: int8_scale must be None unless rescore_vectors is 'int8', got {kept!r}")
    if not isinstance(scale, (np.ndarray, Tensor)) or scale.ndim != 1 or not len(scale):
        raise ValueError("BinaryIndex: int8_scale must be an array or a tensor of one float for each dimension")
    tensor = torch.as_tensor(np.array(scale) if isinstance(scale, np.ndarray) else scale.detach().clone())
    if not tensor.is_floating_point() or not bool((tensor.isfinite() & (tensor > 0)).all()):
        raise ValueError("BinaryIndex: int8_scale must hold finite floats above 0")
    if dim is not None and len(tensor) != dim:
        raise ValueError(f"BinaryIndex: int8_scale must have {dim} dimensions, got {len(tensor)}")
    return tensor.float().cpu()


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """A tensor over the same memory where torch can take it, else over a copy."""
    if isinstance(array, Tensor):
        return array
    # torch takes neither negative strides nor, without a warning, read-only memory
    usable = array.flags.writeable and min(array.strides) >= 0
    return torch.from_numpy(array if usable else array.copy())
