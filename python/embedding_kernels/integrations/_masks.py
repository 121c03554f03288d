"""What transformers' mask means, read once a forward: the rows of each sequence, and which keys a query sees.

transformers builds a mask from a function of (batch, head, query index, key index). That function, and not the window
that a layer passes on, is what eager attention obeys, so the window and the direction are read from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..ops.pooling import pack_padded

#: attribute of a mask tensor under which a forward's `Mask` travels to the layers
ATTRIBUTE = "_embedding_kernels_mask"
#: keyword that tells a layer to see everything. It travels with cu_seq_lens_q and not through the config or a state of
#: the thread, so that nothing is left behind, and a checkpointed layer that runs again in the backward has it too
BIDIRECTIONAL = "embedding_kernels_bidirectional"


@dataclass(frozen=True)
class Visible:
    """Keys that a query sees: lower ≤ key − query ≤ upper; None for no limit."""

    lower: int | None = None
    upper: int | None = None

    @property
    def everything(self) -> bool:
        return self.lower is None and self.upper is None


@dataclass
class Rows:
    """A batch as packed rows. A mask that is None drops no row; positions that are None count within a sequence."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    mask_q: Tensor | None = None
    mask_k: Tensor | None = None
    total_q: int = 0
    total_k: int = 0
    positions_q: Tensor | None = None
    positions_k: Tensor | None = None


@dataclass
class Mask:
    """A forward's mask, the same for every layer that it is given to."""

    visible: Visible
    batch: int
    q_length: int
    kv_length: int
    q_offset: Any = 0
    kv_offset: int = 0
    #: bool [B, ...], False where a key is padding; None where there is none
    padding: Tensor | None = None
    #: [B, S], the number of the text that a token belongs to, where position_ids alone say that rows are packed
    texts: Tensor | None = None
    _rows: Rows | None = field(default=None, repr=False)

    def rows(self, device: torch.device) -> Rows:
        """Read on first use, then kept for the other layers."""
        if self._rows is None:
            self._rows = _rows_of_texts(self.texts) if self.texts is not None else _rows_of_mask(self, device)
        return self._rows


# ---- the mask function that transformers calls ----


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **options: Any,
) -> Tensor:
    """transformers' mask interface: a bool ``[B, kv_length]`` tensor that carries a `Mask` to the layers."""
    texts = None
    if torch.compiler.is_compiling():
        visible = _visible_while_traced(mask_function, options)
    else:
        visible, texts = visible_of(mask_function)
    if isinstance(q_offset, Tensor):
        # a static cache moves its own counter on before the rows are read
        q_offset = q_offset.clone()
    mask = Mask(visible, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, texts)
    if attention_mask is None:
        carrier = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, kv_length)
    else:
        carrier = _key_mask(mask, attention_mask)
    setattr(carrier, ATTRIBUTE, mask)
    return carrier


# ---- which keys a query sees ----


def visible_of(function: Any) -> tuple[Visible, Tensor | None]:
    """The range of key − query that a mask function lets through, and the texts of packed rows if it knows them.

    Raises:
        NotImplementedError: the function is no such range (chunks, blocks, prefixes, …).
    """
    kind = _known_codes().get(getattr(function, "__code__", None))
    if kind == "intersection":
        parts = [visible_of(part) for part in _closed_over(function, "mask_functions")]
        texts = [part_texts for _, part_texts in parts if part_texts is not None]
        return _intersection([visible for visible, _ in parts]), texts[0] if texts else None
    if kind == "union":
        return _union([visible_of(part)[0] for part in _closed_over(function, "mask_functions")]), None
    if kind == "remap":
        return visible_of(_closed_over(function, "mask_function"))
    if kind == "texts":
        return Visible(), _closed_over(function, "packed_sequence_mask")
    return _probe(function), None


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


@cache
def _known_codes() -> dict[CodeType | None, str]:
    """Code objects of transformers' mask functions that combine others."""
    from transformers import masking_utils

    makers: dict[str, tuple[str, tuple[Any, ...]]] = {
        "intersection": ("and_masks", ()),
        "union": ("or_masks", ()),
        "remap": ("remap_positions_for_packed_sequence", (None, None)),
        "texts": ("packed_sequence_mask_function", (None,)),
    }
    return {
        getattr(masking_utils, maker)(*args).__code__: kind
        for kind, (maker, args) in makers.items()
        if hasattr(masking_utils, maker)
    }


def _probe(function: Any) -> Visible:
    code = getattr(function, "__code__", None)
    constants = tuple(cell.cell_contents for cell in getattr(function, "__closure__", None) or ())
    if code is None or not all(isinstance(value, int) for value in constants):
        _refuse_function(function)
    return _probe_once(code, constants, _Probed(function))


class _Probed:
    """A function that counts as equal to any other, so that the code and the constants alone are the cache's key."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Probed)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=256)
def _probe_once(code: CodeType, constants: tuple[int, ...], probed: _Probed) -> Visible:
    """Try the function on keys around two queries, further than any of its constants reaches."""
    reach = 2 * max((abs(value) for value in constants), default=0) + 8
    # near the start too, where a prefix that all may see would show
    found = {_seen_from(probed.function, query, reach) for query in (0, 1, reach, 2 * reach + 3)}
    if len(found) != 1 or None in found:
        _refuse_function(probed.function)
    lower, upper = found.pop() or (0, 0)
    return Visible(None if lower == -reach else lower, None if upper == reach else upper)


def _seen_from(function: Any, query: int, reach: int) -> tuple[int, int] | None:
    """First and last key − query seen from one query, None unless all between and the query itself are seen."""
    keys = torch.arange(query - reach, query + reach + 1)
    zero = torch.zeros((), dtype=torch.long)
    seen = torch.as_tensor(function(zero, zero, torch.tensor(query), keys)).cpu().expand(keys.shape)
    places = seen.nonzero()[:, 0].tolist()
    if not places or not seen[reach] or places[-1] - places[0] + 1 != len(places):
        return None
    return places[0] - reach, places[-1] - reach


def _intersection(ranges: list[Visible]) -> Visible:
    lowers = [each.lower for each in ranges if each.lower is not None]
    uppers = [each.upper for each in ranges if each.upper is not None]
    return Visible(max(lowers, default=None), min(uppers, default=None))


def _union(ranges: list[Visible]) -> Visible:
    # every range holds 0, so a union is a range too
    lowers, uppers = [each.lower for each in ranges], [each.upper for each in ranges]
    lower = None if None in lowers else min(value for value in lowers if value is not None)
    upper = None if None in uppers else max(value for value in uppers if value is not None)
    return Visible(lower, upper)


def _refuse_function(function: Any) -> None:
    name = getattr(function, "__qualname__", type(function).__name__)
    raise NotImplementedError(
        f"plug_attention: the model masks with {name}, which is neither causal, nor bidirectional, nor a window "
        "around the query; use its eager or sdpa attention"
    )


def _visible_while_traced(function: Any, options: dict[str, Any]) -> Visible:
    """The same from what transformers passes beside the function: torch.compile cannot look into a closure."""
    config, window = options.get("config"), options.get("local_size")
    name = getattr(function, "__name__", "")
    if options.get("use_vmap") or name == "or_mask" or getattr(config, "attention_chunk_size", None) is not None:
        raise NotImplementedError(
            "plug_attention: under torch.compile masks must be causal, bidirectional or windows of a usual kind; call "
            "this model without torch.compile"
        )
    if "allow_is_bidirectional_skip" in options:
        return Visible() if window is None else Visible(-window, window)
    return Visible(None if window is None else 1 - window, 0)


# ---- which rows a sequence has ----


def _key_mask(mask: Mask, padding: Tensor) -> Tensor:
    """bool [B, kv_length]: transformers pads on the right for keys of a static cache and starts at kv_offset."""
    missing = mask.kv_length + mask.kv_offset - padding.shape[1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing))
    return padding[:, mask.kv_offset : mask.kv_offset + mask.kv_length]


def _uniform_offsets(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def _full_rows(batch: int, q_length: int, kv_length: int, device: torch.device, q_offset: Any, kv_offset: Any) -> Rows:
    """Every row counts; positions only where queries and keys do not start together."""
    rows = Rows(
        _uniform_offsets(batch, q_length, device),
        _uniform_offsets(batch, kv_length, device),
        q_length,
        kv_length,
    )
    if isinstance(q_offset, Tensor) or q_offset != kv_offset:
        rows.positions_q = (_columns(batch, q_length, device) + q_offset).int().flatten()
        rows.positions_k = (_columns(batch, kv_length, device) + kv_offset).int().flatten()
    return rows


def _columns(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, dtype=torch.int32, device=device).expand(batch, length)


def _rows_of_mask(mask: Mask, device: torch.device) -> Rows:
    rows = _full_rows(mask.batch, mask.q_length, mask.kv_length, device, mask.q_offset, mask.kv_offset)
    if mask.padding is None:
        return rows
    keep = _key_mask(mask, mask.padding)
    longest, total, holes = _read(keep)
    if total == keep.numel():
        return rows
    lengths = keep.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows.cu_seqlens_k, rows.max_seqlen_k, rows.mask_k, rows.total_k = cu_seqlens, longest, keep, total
    alike = mask.q_length == mask.kv_length and rows.positions_q is None
    if alike:
        rows.cu_seqlens_q, rows.max_seqlen_q, rows.mask_q, rows.total_q = cu_seqlens, longest, keep, total
        if not holes:
            return rows
    # eager counts positions by the columns of the batch, whatever stands in them
    columns = (_columns(mask.batch, mask.kv_length, device) + mask.kv_offset).contiguous()
    rows.positions_k = pack_padded(columns, keep, total)
    if alike:
        rows.positions_q = rows.positions_k
    elif rows.positions_q is None:
        rows.positions_q = (_columns(mask.batch, mask.q_length, device) + mask.q_offset).int().flatten()
    return rows


def _read(keep: Tensor) -> tuple[int, int, bool]:
    """Longest sequence, number of tokens, and whether a sequence is broken by padding: the one read of a mask."""
    if keep.numel() == 0:
        return 0, 0, False
    columns = _columns(keep.shape[0], keep.shape[1], keep.device)
    lengths = keep.sum(1, dtype=torch.int32)
    spans = torch.where(keep, columns, -1).amax(1) - torch.where(keep, columns, keep.shape[1]).amin(1) + 1
    holes = ((spans != lengths) & (lengths > 0)).any().to(torch.int32)
    longest, total, broken = torch.stack([lengths.max(), lengths.sum(dtype=torch.int32), holes]).tolist()
    return longest, total, bool(broken)


def _rows_of_texts(texts: Tensor) -> Rows:
    """Rows packed by position_ids alone: a text ends where its number changes, or the row of the batch."""
    changes = torch.ones_like(texts, dtype=torch.bool)
    changes[:, 1:] = texts[:, 1:] != texts[:, :-1]
    starts = changes.flatten().nonzero()[:, 0].to(torch.int32)
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=texts.numel())
    longest = int(cu_seqlens.diff().max()) if starts.numel() else 0
    return Rows(cu_seqlens, cu_seqlens, longest, longest)


# ---- what a layer is given ----


def cannot(module: nn.Module, what: str, instead: str) -> NoReturn:
    raise NotImplementedError(f"plug_attention: {type(module).__name__} {what}; {instead}")


def rows_and_visible(
    module: Any,
    query: Tensor,
    key: Tensor,
    carrier: Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
    extras: dict[str, Any],
) -> tuple[Rows, Visible]:
    mask: Mask | None = getattr(carrier, ATTRIBUTE, None)
    if extras.get(BIDIRECTIONAL):
        visible = Visible()
    elif mask is None:
        visible = _visible_by_arguments(module, is_causal, sliding_window)
    else:
        visible = mask.visible
        if is_causal is not None and is_causal != (visible.upper == 0):
            raise ValueError(
                f"plug_attention: {type(module).__name__} was asked for is_causal={is_causal} but its model made a "
                f"{'causal' if visible.upper == 0 else 'bidirectional'} mask; leave is_causal to the model's default"
            )
    if extras.get("cu_seq_lens_q") is not None:
        if mask is not None and mask.padding is not None and mask.rows(query.device).mask_k is not None:
            raise ValueError(
                f"plug_attention: {type(module).__name__} got packed rows (cu_seq_lens_q) and a mask with padding"
            )
        return _packed_rows(module, query, key, extras), visible
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    if mask is not None:
        if (mask.batch, mask.q_length, mask.kv_length) != (batch, q_length, kv_length):
            cannot(module, f"has {kv_length} keys for a mask of {mask.kv_length}", "call it without a static cache")
        return mask.rows(query.device), visible
    if carrier is not None:
        cannot(
            module,
            "got a mask that transformers' mask functions did not make, or that re-entrant checkpointing copied",
            "pass a mask [B, S] to the model itself, and checkpoint with use_reentrant=False",
        )
    # a step of generation: the queries are the last rows
    return _full_rows(batch, q_length, kv_length, query.device, kv_length - q_length, 0), visible


def _visible_by_arguments(module: Any, is_causal: bool | None, sliding_window: int | None) -> Visible:
    """For a layer that was given no mask: transformers' rule for attention without one."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal:
        return Visible(None if sliding_window is None else 1 - sliding_window, 0)
    if sliding_window is not None:
        cannot(module, "has a window in both directions but got no mask to tell its bounds", "use its own attention")
    return Visible()


def _packed_rows(module: nn.Module, query: Tensor, key: Tensor, extras: dict[str, Any]) -> Rows:
    cu_seqlens = extras["cu_seq_lens_q"]
    cu_seqlens_k = extras.get("cu_seq_lens_k")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        cannot(
            module,
            f"got cu_seq_lens_q with {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys",
            "packed batches have one row and no cache",
        )
    longest, longest_k = extras.get("max_length_q"), extras.get("max_length_k")
    if longest is None or longest_k is None:
        longest = longest_k = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    offsets = [
        each.to(device=query.device, dtype=torch.int32) for each in (cu_seqlens, cu_seqlens_k) if each is not None
    ]
    return Rows(offsets[0], offsets[-1], int(longest), int(longest_k))
