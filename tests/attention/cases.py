"""Which calls of varlen_attention are tried, forward and backward: sizes where an option matters, and a draw of all."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from attention.definition import FLOATS, Case

#: past a tile of 16, 32, 64 and 128 rows, and beside it; an empty one between
TILES = (1, 2, 15, 0, 17, 33, 63, 65, 129)
LONG = (200, 300)
#: many short texts and one long one
RAGGED = (3, 1, 70, 2, 2, 5, 0, 1, 4, 9, 1, 6)
#: more than a warp looks up at once
MANY = (1, 3, 0, 2) * 10
#: dimensions of the heads of q and k, and of v
DIMS = ((16, 16), (24, 24), (40, 64), (64, 64), (72, 40), (128, 128), (256, 256), (64, 16))
#: heads of q, and of k and v
HEADS = ((1, 1), (3, 3), (3, 1), (8, 1), (6, 2))

SHORT = (5, 33, 1)
OTHER_K = (40, 2, 33)
OPTIONS = {
    "plain": {},
    "scale": {"options": {"scale": 0.7}},
    "causal": {"options": {"causal": True}},
    "causal_other_keys": {"lengths_k": OTHER_K, "options": {"causal": True}},
    "window": {"lengths": (70, 3), "options": {"window_left": 20, "window_right": 7}},
    "window_left": {"lengths": (70, 3), "options": {"window_left": 33}},
    "window_right": {"lengths": (70, 3), "options": {"window_right": 0}},
    "window_of_itself": {"lengths": (40, 3), "options": {"window_left": 0, "window_right": 0}},
    "causal_window": {"lengths": (70, 3), "options": {"causal": True, "window_left": 16}},
    "window_past_the_keys": {"lengths": (60, 4), "lengths_k": (20, 9), "options": {"window_left": 8}},
    "softcap": {"options": {"softcap": 3.0, "scale": 0.6}},
    "bias_table": {"lengths": (70, 3, 1), "reach": 9},
    "bias_table_of_one": {"reach": 0},
    "bias_table_past_the_text": {"reach": 91},
    "bias_table_of_many_entries": {"lengths": (5, 3), "lengths_k": (250, 3), "heads": 1, "reach": 300},
    "rope": {"rotated": 32},
    "rope_partial": {"rotated": 10},
    "positions_shifted": {"lengths_k": OTHER_K, "positions": "shifted", "rotated": 32, "options": {"causal": True}},
    "positions_drawn": {"positions": "drawn", "reach": 6, "options": {"window_left": 12, "window_right": 20}},
    "positions_causal": {"positions": "drawn", "options": {"causal": True}},
    "seqused_k": {"lengths_k": OTHER_K, "used": 0.6},
    "seqused_none": {"used": 0.0},
    "other_keys": {"lengths_k": OTHER_K},
    "no_keys": {"lengths": (4, 3), "lengths_k": (0, 5)},
    "no_keys_at_all": {"lengths": (4, 3), "lengths_k": (0, 0), "reach": 2, "rotated": 8},
    "no_queries": {"lengths": (0, 3), "lengths_k": (7, 5)},
    "everything": {
        "lengths": (30, 3, 17), "lengths_k": (20, 40, 33), "heads": 4, "kv_heads": 2, "dim": 40, "dim_v": 24,
        "reach": 5, "rotated": 24, "positions": "drawn", "used": 0.8,
        "options": {"causal": True, "window_left": 30, "window_right": 2, "softcap": 6.0, "scale": 0.3},
    },
}  # fmt: skip


def option_case(name: str, dtype: torch.dtype) -> Case:
    return Case(**{"lengths": SHORT, "dtype": dtype, **OPTIONS[name]})


@st.composite
def cases(draw: st.DrawFn, longest: int, most: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Case:
    """Any combination of options over at most ``most`` sequences of at most ``longest`` tokens."""
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=most), "lengths")
    other = draw(st.booleans(), "other keys")
    lengths_k = [draw(st.integers(0, longest)) for _ in lengths] if other else None
    kv_heads = draw(st.integers(1, 3), "kv_heads")
    dim = 8 * draw(st.integers(2, 12), "dim")
    window = st.one_of(st.just(-1), st.integers(0, longest))
    options = {
        "causal": draw(st.booleans(), "causal"),
        "window_left": draw(window, "window_left"),
        "window_right": draw(window, "window_right"),
        "softcap": draw(st.sampled_from((0.0, 0.0, 2.0, 30.0)), "softcap"),
        "scale": draw(st.sampled_from((None, 0.2, 1.0)), "scale"),
    }
    torch.manual_seed(draw(st.integers(0, 99), "seed"))
    return Case(
        lengths=tuple(lengths),
        lengths_k=None if lengths_k is None else tuple(lengths_k),
        heads=kv_heads * draw(st.integers(1, 3), "group"),
        kv_heads=kv_heads,
        dim=dim,
        dim_v=8 * draw(st.integers(2, 12), "dim_v"),
        dtype=draw(st.sampled_from(dtypes), "dtype"),
        reach=draw(st.one_of(st.none(), st.integers(0, longest)), "reach"),
        rotated=2 * draw(st.integers(0, dim // 2), "rotated"),
        positions=draw(st.sampled_from(("", "", "shifted", "drawn")), "positions"),
        used=draw(st.sampled_from((None, None, 0.5)), "used"),
        options=options,
    )
