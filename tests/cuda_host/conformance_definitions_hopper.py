"""What each wrapper of csrc/cuda/ptx_hopper.cuh does, as conformance_definitions.py has it for those of ptx.cuh. A
block's operands are one row of words: parameters first, then what they are about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_host.conformance_definitions import (
    Draw,
    Instruction,
    Shape,
    Words,
    arrive,
    bfloat16_values,
    bit_values,
    bits,
    float16_values,
    opposite,
    round_bfloat16,
    round_float16,
)

PARAMETERS = 64
_ANY = {"random bits": bits}


def _rows(words: Words) -> Words:
    """[blocks, words] of [blocks, threads, words]."""
    return np.ascontiguousarray(words).reshape(len(words), -1)


def _threads(rows: Words, threads: int = 128) -> Words:
    return rows.reshape(len(rows), threads, -1)


# ---- barriers and registers ----


def _phases(words: Words) -> Words:
    """Whether the phase before the first has passed; then what the opposite thread wrote in each of three."""
    return np.concatenate([np.ones_like(words), *(words[:, ::-1] + np.uint32(phase) for phase in range(3))], axis=-1)


# ---- boxes: "Tensors", "Swizzling modes" ----


@dataclass(frozen=True)
class Tensor:
    """As a tensor map has it, the innermost dimension first; sizes in elements, strides in bytes."""

    element: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzled: bool = True

    @property
    def box_bytes(self) -> int:
        return self.element * int(np.prod(self.box))

    @property
    def words(self) -> int:
        return self.sizes[-1] * self.strides[-1] // 4

    def places(self, first: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of every byte of the box at `first` that lies inside the tensor: its place there, and in shared memory."""
        inner_first = np.indices(self.box[::-1])[::-1].reshape(len(self.box), -1)
        at = inner_first + first.astype(np.int64)[:, None]
        inside = ((at >= 0) & (at < np.array(self.sizes)[:, None])).all(axis=0)
        tensor = (at * np.array(self.strides)[:, None]).sum(axis=0)[inside]
        shared = (np.arange(inside.size) * self.element)[inside]
        if self.swizzled:  # 16-byte pieces of a row of 128 bytes change places by the row's number
            shared ^= shared // 128 % 8 * 16
        bytes_of = np.arange(self.element)
        return (tensor[:, None] + bytes_of).ravel(), (shared[:, None] + bytes_of).ravel()


HALVES = Tensor(2, (72, 40), (2, 160), (64, 24))
BYTES = Tensor(1, (200, 40), (1, 208), (128, 24))
FLOATS = Tensor(4, (40, 40), (4, 176), (16, 24), swizzled=False)
FIVE = Tensor(2, (72, 3, 5, 2, 3), (2, 160, 480, 2400, 4800), (64, 2, 3, 2, 1))
RAGGED = Tensor(2, (72, 3, 90), (2, 160, 480), (64, 1, 64))
# the tensor that ends with a sequence, and the first element of a box of it
Find = Callable[[NDArray[Any]], tuple[Tensor, NDArray[Any]]]


def _plain(tensor: Tensor, parameters: NDArray[Any]) -> tuple[Tensor, NDArray[Any]]:
    return tensor, parameters[: len(tensor.box)]


def _of_sequence(parameters: NDArray[Any]) -> tuple[Tensor, NDArray[Any]]:
    """Parameters: column, head, first row of the sequence, its count of rows, row in it."""
    column, head, first, count, row = parameters[:5]
    ends = Tensor(2, (*RAGGED.sizes[:2], int(first + count)), RAGGED.strides, RAGGED.box)
    return ends, np.array([column, head, first + row])


def _load(find: Find, boxes: int = 1, each: int = 0) -> Callable[[Words], Words]:
    """Boxes one after the other; zeros where there is no tensor."""

    def definition(words: Words) -> Words:
        found = []
        for row in _rows(words):
            source = row[PARAMETERS:].view(np.uint8)
            for i in range(boxes):
                tensor, first = find(row[:PARAMETERS].view(np.int32)[each * i :])
                box = np.zeros(tensor.box_bytes, np.uint8)
                from_tensor, to_shared = tensor.places(first)
                box[to_shared] = source[from_tensor]
                found.append(box.view(np.uint32))
        return _threads(np.stack(found).reshape(len(words), -1))

    return definition


def _store(find: Find, result_words: int, boxes: int = 1, each: int = 0) -> Callable[[Words], Words]:
    """Results are all ones where nothing is stored."""

    def definition(words: Words) -> Words:
        results = np.full((len(words), -(-result_words // 128) * 128), 0xFFFFFFFF, np.uint32)
        for row, result in zip(_rows(words), results, strict=True):
            for i in range(boxes):
                tensor, first = find(row[:PARAMETERS].view(np.int32)[each * i :])
                box = row[PARAMETERS + i * tensor.box_bytes // 4 :].view(np.uint8)
                to_tensor, from_shared = tensor.places(first)
                result.view(np.uint8)[to_tensor] = box[from_shared]
        return _threads(results)

    return definition


def _first_of_box(tensor: Tensor, how: str, seeded: np.random.Generator) -> list[int]:
    """Inside; across (or, where a box is of one, past) an edge of one dimension; far away in one. In the innermost
    dimension boxes begin at multiples of 16 bytes."""
    kind, _, number = how.partition(" ")
    chosen = -1 if kind == "inside" else int(number) if number else int(seeded.integers(len(tensor.box)))
    first = []
    for d, (size, box) in enumerate(zip(tensor.sizes, tensor.box, strict=True)):
        step = 16 // tensor.element if d == 0 else 1
        below, inside, above = (1, max(box // step, 2)), (0, (size - box) // step + 1), (size - box) // step
        if d != chosen:
            at = int(seeded.integers(*inside))
        elif kind == "across":
            at = -int(seeded.integers(*below)) if seeded.random() < 0.5 else above + int(seeded.integers(*below))
        else:
            at = -box - int(seeded.integers(1 << 20)) if seeded.random() < 0.5 else size + int(seeded.integers(1 << 26))
        first.append(at * step)
    return first


def _places(tensor: Tensor, how: str, boxes: int = 1, apart: bool = False) -> Draw:
    """Random bits, whose first words are places of boxes; `apart`: of different places in the last dimension."""

    def draw(seeded: np.random.Generator, shape: Shape) -> Words:
        words = bits(seeded, shape)
        rows = words.reshape(len(words), -1)
        for row in rows:
            found = [_first_of_box(tensor, how, seeded) for _ in range(boxes)]
            if apart:
                for first, last in zip(found, seeded.permutation(tensor.sizes[-1])[:boxes], strict=True):
                    first[-1] = int(last)
            row[: boxes * len(tensor.box)].view(np.int32)[:] = np.concatenate(found)
        return words

    return draw


def _all_places(tensor: Tensor, boxes: int = 1) -> dict[str, Draw]:
    kinds = ("inside", *(f"across {d}" for d in range(len(tensor.box))), "far")
    return {kind: _places(tensor, kind, boxes) for kind in kinds}


def _sequences(seeded: np.random.Generator, shape: Shape) -> Words:
    """Sequences of 0 to 90 rows of 90; boxes of them that are whole, broken, and past the end."""
    words = bits(seeded, shape)
    for number, row in enumerate(words.reshape(len(words), -1)):
        count = int(seeded.integers(30, 91)) if number % 3 else 16 * int(seeded.integers(0, 6))
        first = int(seeded.integers(0, 91 - count))
        row[:5] = (64 * seeded.integers(2), seeded.integers(3), first, count, 64 * seeded.integers(2))
    return words


_HALVES, _FIVE = partial(_plain, HALVES), partial(_plain, FIVE)
_LOAD2 = Instruction(_load(_HALVES), _all_places(HALVES))
_STORE5 = Instruction(_store(_FIVE, FIVE.words), _all_places(FIVE))
_STORE5_TWICE = Instruction(
    _store(_FIVE, FIVE.words, boxes=2, each=5),
    {kind: _places(FIVE, kind, 2, apart=True) for kind in ("inside", "across 0", "across 2")},
)


# ---- products: "Register fragments", wgmma ----


def _of_blocks(columns: int) -> tuple[slice, NDArray[Any], NDArray[Any]]:
    """Of all blocks, row and column of every sum [128, columns / 2] of D [64, columns]."""
    thread, i = np.indices((128, columns // 2))
    lane = thread % 32
    return slice(None), 16 * (thread // 32) + lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + lane % 4 * 2 + i % 2


def _held_factor(registers: NDArray[Any], values: Callable[[Words], Any]) -> NDArray[np.float64]:
    """A [blocks, 64, 16] of four registers of two values a thread."""
    of_thread = values(np.ascontiguousarray(registers)).reshape(len(registers), 128, 8)
    thread, i = np.indices((128, 8))
    row = 16 * (thread // 32) + thread % 32 // 4 + np.where((i < 2) | (i >= 4) & (i < 6), 0, 8)
    factor = np.zeros((len(registers), 64, 16))
    factor[:, row, thread % 4 * 2 + i % 2 + 8 * (i >= 4)] = of_thread
    return factor


Factors = list[tuple[NDArray[np.float64], NDArray[np.float64]]]


@dataclass(frozen=True)
class Product:
    """Left [64, K] times right [N, K] of each step, plus the sums [64, N] before; in float64, exact for bits. Rows of
    factors in shared memory have `row_words` words; parameters are the steps, or a step and whether to add."""

    columns: int
    values: Callable[[Words], Any]
    row_words: int = 64
    step_values: int = 16
    held: bool = False

    @property
    def words_of_factors(self) -> int:
        return 32 * self.columns + 4 * 128 if self.held else (64 + self.columns) * self.row_words

    def of_tiles(self, rows: Words, steps: int) -> Factors:
        """Columns of left [64] and right [N], both by their rows."""
        given = np.ascontiguousarray(rows[:, PARAMETERS:][:, : self.words_of_factors])
        both = self.values(given).reshape(len(rows), 64 + self.columns, -1)
        of_step = rows[:, None, :steps, None].astype(int) * self.step_values + np.arange(self.step_values)
        found = [np.take_along_axis(both, of_step[:, :, step], axis=2) for step in range(steps)]
        return [(values[:, :64], values[:, 64:]) for values in found]

    def of_registers(self, rows: Words) -> Factors:
        """Rows of right [64, N], which comes before left's registers."""
        right, registers = np.split(rows[:, PARAMETERS:][:, : self.words_of_factors], [32 * self.columns], axis=1)
        of_step = rows[:, :1].astype(int) * self.step_values + np.arange(self.step_values)
        by_rows = self.values(np.ascontiguousarray(right)).reshape(len(rows), 64, self.columns)
        chosen = np.take_along_axis(by_rows, of_step[..., None], axis=1)
        return [(_held_factor(registers.reshape(-1, 128, 4), self.values), chosen.swapaxes(1, 2))]

    def operands(self, words: Words, steps: int = 1) -> tuple[Factors, NDArray[np.float64]]:
        rows = _rows(words)
        factors = self.of_registers(rows) if self.held else self.of_tiles(rows, steps)
        given = np.ascontiguousarray(rows[:, PARAMETERS + self.words_of_factors :][:, : 64 * self.columns])
        sums = np.zeros((len(rows), 64, self.columns))
        numbers = given if self.step_values == 256 else given.view(np.float32)
        sums[_of_blocks(self.columns)] = numbers.reshape(len(rows), 128, -1)
        if not self.held and steps == 1:
            sums[rows[:, 1] == 0] = 0
        return factors, sums

    def packed(self, sums: NDArray[np.float64]) -> Words:
        found = sums[_of_blocks(self.columns)]
        return found.astype(np.uint64).astype(np.uint32) if self.step_values == 256 else _float_words(found)

    def definition(self, words: Words) -> Words:
        ((left, right),), sums = self.operands(words)
        return self.packed(sums + left @ right.swapaxes(1, 2))

    def tolerance(self, words: Words, steps: int = 1) -> NDArray[np.float64]:
        """Additions come in any order and at least in single precision: each of a step's 16 and the sum before may be
        cut off, not rounded, below the last bit of all terms' sizes together."""
        factors, sums = self.operands(words, steps)
        terms = np.abs(sums) + sum(np.abs(left) @ np.abs(right).swapaxes(1, 2) for left, right in factors)
        return (17 * steps * 2.0**-23 * terms)[_of_blocks(self.columns)]

    def in_turn(self, words: Words) -> Words:
        """The first product's sums, negated, are those before the second."""
        (first, second), sums = self.operands(words, 2)
        after = sums + first[0] @ first[1].swapaxes(1, 2)
        return self.packed(second[0] @ second[1].swapaxes(1, 2) - after)

    def together(self, words: Words) -> Words:
        factors, sums = self.operands(words, 2)
        return self.packed(sums + sum(left @ right.swapaxes(1, 2) for left, right in factors))

    def apart(self, words: Words) -> Words:
        """All threads' sums of the first product, then all of the second."""
        factors, sums = self.operands(words, 2)
        return _one_after_other([self.packed(sums + left @ right.swapaxes(1, 2)) for left, right in factors])

    def apart_tolerance(self, words: Words) -> NDArray[np.float64]:
        return _one_after_other([self.tolerance(words, 2)] * 2)


def _float_words(values: NDArray[np.float64]) -> Words:
    return values.astype(np.float32).view(np.uint32)


def _one_after_other(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1).reshape(len(parts[0]), 128, -1)


def _drawn(product: Product, pack: Callable[[NDArray[np.float32]], Words], whole: bool) -> Draw:
    """Factors and sums, normal or small whole numbers, whose sums are exact; steps; whether to add, 0, 1 or 2."""

    def numbers(seeded: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        drawn = seeded.integers(-16, 17, shape) if whole else seeded.standard_normal(shape)
        return drawn.astype(np.float32)

    def draw(seeded: np.random.Generator, shape: Shape) -> Words:
        rows = bits(seeded, shape).reshape(shape[0], -1)
        rows[:, :2] = seeded.integers(0, 4 if product.held else 8, (shape[0], 2))
        halves = rows[:, PARAMETERS:].view(np.uint16)
        halves[:] = pack(numbers(seeded, halves.shape).view(np.uint32)).astype(np.uint16)
        sums = rows[:, PARAMETERS + product.words_of_factors :]
        sums[:] = numbers(seeded, sums.shape).view(np.uint32)
        return rows.reshape(shape)

    return draw


def _steps_and_bits(seeded: np.random.Generator, shape: Shape) -> Words:
    words = bits(seeded, shape)
    words.reshape(shape[0], -1)[:, :2] = seeded.integers(0, (4, 3), (shape[0], 2))
    return words


def _with_add(draw: Draw) -> Draw:
    def changed(seeded: np.random.Generator, shape: Shape) -> Words:
        words = draw(seeded, shape)
        words.reshape(shape[0], -1)[:, 1] = seeded.integers(0, 3, shape[0])
        return words

    return changed


def _multiplies(columns: int, kind: str, held: bool = False, two: str = "") -> Instruction:
    pack, values = (round_bfloat16, bfloat16_values) if kind == "bfloat16" else (round_float16, float16_values)
    product = Product(columns, values, held=held)
    operands = {name: _drawn(product, pack, name == "whole numbers") for name in ("whole numbers", "normal numbers")}
    if not (held or two):
        operands = {name: _with_add(draw) for name, draw in operands.items()}
    definition = getattr(product, two or "definition")
    tolerance = product.apart_tolerance if two == "apart" else partial(product.tolerance, steps=2 if two else 1)
    return Instruction(definition, operands, tolerance, exact=("whole numbers",))


# ---- the table, by name in conformance_hopper.cu ----

_PHASES, _OPPOSITE = Instruction(_phases, _ANY), Instruction(opposite, _ANY)

HOPPER: dict[str, Instruction] = {
    "begin_barrier": _PHASES,
    "has_passed": _PHASES,
    "arrive_at": Instruction(arrive, _ANY),
    "publish_barriers": _LOAD2,
    "prefetch_map": _LOAD2,
    "arrive_expecting": Instruction(_load(_HALVES, boxes=2, each=2), _all_places(HALVES, 2)),
    "load_box2 halves": _LOAD2,
    "load_box2 bytes": Instruction(_load(partial(_plain, BYTES)), _all_places(BYTES)),
    "load_box2 floats": Instruction(_load(partial(_plain, FLOATS)), _all_places(FLOATS)),
    "load_box5": Instruction(_load(_FIVE), _all_places(FIVE)),
    "load_box5 ragged": Instruction(_load(_of_sequence), {"sequences": _sequences}),
    "store_box5": _STORE5,
    "store_box5 ragged": Instruction(_store(_of_sequence, RAGGED.words), {"sequences": _sequences}),
    "publish_stores": _STORE5,
    "commit_stores": _STORE5_TWICE,
    "wait_stores_read": _STORE5_TWICE,
    "keep_registers": _OPPOSITE,
    "take_registers": _OPPOSITE,
    "begin_products": _multiplies(64, "bfloat16", two="in_turn"),
    "commit_products": _multiplies(64, "bfloat16", two="together"),
    "wait_products": _multiplies(64, "bfloat16", two="apart"),
    **{
        f"multiply_tiles_{kind} {columns}": _multiplies(columns, kind)
        for kind in ("bfloat16", "float16")
        for columns in (64, 128)
    },
    **{
        f"multiply_held_{kind} {columns}": _multiplies(columns, kind, held=True)
        for kind in ("bfloat16", "float16")
        for columns in (64, 96, 128, 256)
    },
    "count_common_bits": Instruction(
        Product(256, bit_values, row_words=32, step_values=256).definition, {"random bits": _steps_and_bits}
    ),
}
