"""What each rank of `test_sharded` runs: every case, one after the other; the outcome goes to a file of its own.

On GPUs, one a rank, where the second argument is "cuda": then only what compares answers."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from embedding_kernels import BinaryIndex, ShardedBinaryIndex
from embedding_kernels.index import sharded as sharded_module

CASES: dict[str, Callable[[Path], None]] = {}
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = f"cuda:{RANK}" if sys.argv[2:] == ["cuda"] else "cpu"


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


def rows_of(counts: list[int], dim: int, seed: int = 0) -> list[np.ndarray]:
    """Each rank's rows; many have equal codes, also on different ranks, so that ties decide."""
    draw = np.random.default_rng(seed)
    centres = draw.integers(-1, 2, (max(1, sum(counts) // 4), dim)).astype(np.float32)
    return [
        centres[draw.integers(len(centres), size=count)] * draw.uniform(0.5, 2, (count, 1)).astype(np.float32)
        for count in counts
    ]


def spread(count: int, uneven: bool = False) -> list[int]:
    """Rows of each rank: as many on all, or the most on rank 0 and none on rank 1."""
    if not uneven:
        return [count // SIZE] * SIZE
    return [count, 0, *range(5, 5 + SIZE)][:SIZE]


def both(rows: list[np.ndarray], dim: int | None = None) -> tuple[BinaryIndex, ShardedBinaryIndex]:
    single, sharded = BinaryIndex(dim, device=DEVICE), ShardedBinaryIndex(dim, device=DEVICE, timeout=30)
    for part in rows:
        single.add(part)
    sharded.add(rows[RANK])
    return single, sharded


def assert_same(expected: tuple, got: tuple) -> None:
    for one, other in zip(expected, got, strict=True):
        assert type(one) is type(other)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def assert_equal_searches(single: BinaryIndex, sharded: ShardedBinaryIndex, queries: np.ndarray, *ks: int) -> None:
    assert (sharded.ntotal, sharded.dim) == (single.ntotal, single.dim)
    widths = [None] if single.dim is None else [None, single.dim // 16 * 8 or None]
    for k in ks or (1, 10, 400):
        for width in widths:
            for multiplier in (None, 1, 4):
                arguments = queries, k, multiplier
                assert_same(
                    single.search(*arguments, truncate_dim=width), sharded.search(*arguments, truncate_dim=width)
                )
    radius = queries.shape[1] // 2
    assert_same(single.range_search(queries, radius), sharded.range_search(queries, radius))
    assert_same(single.range_search(queries, 0), sharded.range_search(queries, 0))


@contextmanager
def raises(here: type[Exception], there: type[Exception], rank: int, *words: str) -> Iterator[None]:
    """What ``rank`` raises, and the others; all must say these words."""
    expected = here if rank == RANK else there
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    assert type(raised) is expected, f"{raised!r} is no {expected.__name__}"
    for word in words:
        assert word in str(raised), f"{word!r} is not in {raised}"


@contextmanager
def replaced(thing: object, name: str, value: object) -> Iterator[None]:
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@case
def equals_one_index(directory: Path) -> None:
    for uneven in (False, True):
        for dim in (13, 64, 200):
            single, sharded = both(rows_of(spread(120, uneven), dim))
            assert_equal_searches(single, sharded, rows_of([9], dim, seed=1)[0])


@case
def equals_one_index_on_random_rows(directory: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.standard_normal((count, 64), dtype=np.float32) for count in spread(3000)]
    single, sharded = both(rows)
    assert_equal_searches(single, sharded, draw.standard_normal((20, 64), dtype=np.float32))


@case
def equals_one_empty_index(directory: Path) -> None:
    queries = rows_of([3], 64)[0]
    for dim in (None, 64):
        assert_equal_searches(BinaryIndex(dim), ShardedBinaryIndex(dim, device=DEVICE), queries, 1, 5)
    single, sharded = both([np.empty((0, 64), np.float32)] * SIZE)
    assert_equal_searches(single, sharded, queries, 1, 5)
    # one rank knows the dim and the others learn it
    learnt = ShardedBinaryIndex(64 if RANK == SIZE - 1 else None, device=DEVICE)
    with raises(ValueError, ValueError, 0, "search: queries must be vectors of 64 dimensions"):
        learnt.search(queries[:, :63], 3)
    assert_equal_searches(single, learnt, queries, 1, 5)


@case
def equals_one_index_for_any_queries(directory: Path) -> None:
    single, sharded = both(rows_of(spread(120), 64))
    queries = rows_of([9], 64, seed=1)[0]
    odd = queries.copy()
    odd[0, 0], odd[1, 1], odd[2, 2], odd[3, :4] = np.nan, np.inf, -np.inf, (np.nan, np.inf, -np.inf, np.nan)
    tensor = torch.from_numpy(queries)
    for kind in (queries.astype(np.float64), queries[::-1], odd, tensor, tensor.bfloat16(), queries[:0], tensor[:0]):
        for k, multiplier in ((50, None), (50, 3), (150, 2)):  # 120 rows: among the 150 some are missing
            assert_same(single.search(kind, k, multiplier), sharded.search(kind, k, multiplier))
        assert_same(single.range_search(kind, 30), sharded.range_search(kind, 30))
    codes = np.packbits(queries > 0, axis=1)
    assert_same(single.search(codes, 50), sharded.search(codes, 50))
    assert_same(single.search(codes[:, :2], 50, truncate_dim=16), sharded.search(codes[:, :2], 50, truncate_dim=16))
    assert_same(
        single.search(queries[:, :16], 50, 2, truncate_dim=16), sharded.search(queries[:, :16], 50, 2, truncate_dim=16)
    )


@case
def equals_one_index_block_by_block(directory: Path) -> None:
    single, sharded = both(rows_of(spread(120), 64))
    queries = rows_of([23], 64, seed=1)[0]
    with replaced(sharded_module, "_QUERY_BLOCK", 7):
        assert_equal_searches(single, sharded, queries)
    calls = 0
    search = sharded._shard.search

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return search(*arguments, **options)

    with replaced(sharded_module, "_CANDIDATES", 100), replaced(sharded._shard, "search", counted):
        assert_equal_searches(single, sharded, queries, 5)
        sharded.search(queries, 10, 2)
        calls = 0
        sharded.search(queries, 10, 2)
    assert calls == 1 + -(-len(queries) // 5)  # the check, and blocks of 5 queries with 20 candidates each


@case
def says_what_it_holds(directory: Path) -> None:
    counts = spread(12, uneven=True)
    rows = rows_of(counts, 16)
    _, sharded = both(rows)
    assert (len(sharded), sharded.ntotal, sharded.counts) == (sum(counts), sum(counts), counts)
    assert sharded.offset == sum(counts[:RANK])
    assert repr(sharded) == (
        f"ShardedBinaryIndex(dim=16, ntotal={sum(counts)}, rank={RANK}, counts={counts}, device=cpu)"
    )
    # rows added later to lower ranks move those of higher ones
    more = rows_of([3] * SIZE, 16, seed=2)
    sharded.add(more[RANK])
    assert sharded.offset == sum(counts[:RANK]) + 3 * RANK
    again = BinaryIndex()
    for part, later in zip(rows, more, strict=True):
        again.add(part)
        again.add(later)
    assert_equal_searches(again, sharded, rows_of([5], 16, seed=1)[0])


@case
def an_error_on_one_rank_is_one_on_all(directory: Path) -> None:
    single, sharded = both(rows_of(spread(120), 64))
    queries = rows_of([9], 64, seed=1)[0]
    bad = [
        ((queries, 0), {}, "search: k must be an integer of at least 1, got 0"),
        ((queries.tolist(), 3), {}, "search: queries must be a NumPy array or a tensor, got list"),
        ((queries[:, :63], 3), {}, "search: queries must be vectors of 64 dimensions"),
        ((queries[0], 3), {}, "search: queries must have 2 dimensions"),
        ((queries, 3, 0), {}, "search: rescore_multiplier must be an integer of at least 1"),
        ((queries, 3), {"truncate_dim": 9}, "search: truncate_dim must be a multiple of 8"),
    ]
    for rank in range(SIZE):
        for arguments, options, message in bad:
            named = () if rank == RANK else (f"rank {rank} failed: ValueError",)
            with raises(ValueError, RuntimeError, rank, message, *named):
                sharded.search(*(arguments if rank == RANK else (queries, 3)), **(options if rank == RANK else {}))
        with raises(ValueError, RuntimeError, rank, "range_search: radius must be an integer of at least 0, got -1"):
            sharded.range_search(queries, -1 if rank == RANK else 1)
    assert_equal_searches(single, sharded, queries, 3)


@case
def ranks_must_pass_the_same(directory: Path) -> None:
    single, sharded = both(rows_of(spread(120), 64))
    queries = rows_of([9], 64, seed=1)[0]
    last = RANK == SIZE - 1
    other = queries.copy()
    other[8, 63] += 1
    words = f"search: the queries and the other arguments must be the same on all ranks, ranks 0 and {SIZE - 1} differ"
    for changed in ((other, 3), (queries[:8], 3), (queries.astype(np.float64), 3), (queries, 4), (queries, 3, 2)):
        with raises(ValueError, ValueError, 0, words):
            sharded.search(*(changed if last else (queries, 3)))
    with raises(ValueError, ValueError, 0, words):
        sharded.search(queries, 3, truncate_dim=8 if last else None)
    with raises(ValueError, ValueError, 0, "range_" + words):
        sharded.range_search(queries, 4 if last else 5)
    with raises(RuntimeError, RuntimeError, 0, "all ranks must make the same call"):
        sharded.search(queries, 3) if last else sharded.range_search(queries, 3)
    assert_equal_searches(single, sharded, queries, 3)
    with raises(
        ValueError, ValueError, 0, f"dim must be the same on all ranks, got 64 on rank 0 and 72 on rank {SIZE - 1}"
    ):
        ShardedBinaryIndex(72 if last else 64)
    with raises(
        ValueError, ValueError, 0, f"type of device must be the same on all ranks, ranks 0 and {SIZE - 1} differ"
    ):
        ShardedBinaryIndex(64, device="meta" if last else "cpu")
    with raises(ValueError, RuntimeError, SIZE - 1, "dim must be a positive integer"):
        ShardedBinaryIndex(0 if last else 64)


@case
def a_refused_add_adds_nothing_anywhere(directory: Path) -> None:
    rows = rows_of(spread(120), 64)
    single, sharded = both(rows)
    for bad in (rows[0][:, :9], rows[0].astype(np.int32), rows[0].tolist(), rows[0][0]):
        with raises(ValueError, RuntimeError, 1, "add: vectors must"):
            sharded.add(bad if RANK == 1 else rows[0])
    assert_equal_searches(single, sharded, rows[0][:3], 3)
    fresh = ShardedBinaryIndex()
    with raises(ValueError, ValueError, 0, "add: dim must be the same on all ranks, got 64 on rank 0 and 8 on rank 1"):
        fresh.add(rows[0][:, : 8 if RANK == 1 else 64])
    assert (fresh.dim, fresh.ntotal) == (None, 0)
    fresh.add(rows[RANK])
    assert_equal_searches(single, fresh, rows[0][:3], 3)


@case
def a_failure_in_the_work_is_one_on_all(directory: Path) -> None:
    rows = rows_of(spread(120), 64)
    single, sharded = both(rows)
    queries = rows[0][:3]
    for name, healthy_calls in (("search", 1), ("reconstruct", 0)):  # the first search only checks its arguments
        work = getattr(sharded._shard, name)
        results = [work] * healthy_calls + [raising(MemoryError("no more room")) if RANK == 1 else work]

        def fail_later(*arguments: object, **options: object) -> object:
            return results.pop(0)(*arguments, **options)  # noqa: B023

        named = () if RANK == 1 else ("rank 1 failed: MemoryError",)
        with replaced(sharded._shard, name, fail_later), raises(MemoryError, RuntimeError, 1, "no more room", *named):
            sharded.search(queries, 3, 2)
        assert_equal_searches(single, sharded, queries, 3)
    # some ranks have added now and others not
    failing = raising(MemoryError("no more room")) if RANK == 1 else sharded._shard.add
    with replaced(sharded._shard, "add", failing), raises(MemoryError, RuntimeError, 1, "no more room"):
        sharded.add(rows[RANK])
    with raises(RuntimeError, RuntimeError, 0, "the ranks lost each other in an earlier call"):
        sharded.search(queries, 3)


@case
def save_and_load(directory: Path) -> None:
    path, queries = directory / "saved", rows_of([5], 64, seed=1)[0]
    rows = rows_of(spread(120, uneven=True), 64)
    single, sharded = both(rows)
    sharded.save(path)
    for verify in (True, False):
        loaded = ShardedBinaryIndex.load(path, verify)
        assert loaded.counts == sharded.counts
        assert_equal_searches(single, loaded, queries)
    # each shard is an index
    names = json.loads((path / "shards.json").read_text())["shards"]
    assert BinaryIndex.load(path / names[RANK]).ntotal == len(rows[RANK])

    # again to the same place, from the one that has it mapped; the shards of before go
    more = rows_of([4] * SIZE, 64, seed=3)
    loaded.add(more[RANK])
    loaded.save(path)
    whole = BinaryIndex()
    for part, later in zip(rows, more, strict=True):
        whole.add(part)
        whole.add(later)
    assert_equal_searches(whole, loaded, queries)
    assert_equal_searches(whole, ShardedBinaryIndex.load(path), queries)
    names = json.loads((path / "shards.json").read_text())["shards"]
    assert sorted(entry.name for entry in path.iterdir()) == [*names, "shards.json"]
    assert_equal_searches(single, sharded, queries)  # whose files are gone


@case
def a_failed_save_leaves_the_state_before(directory: Path) -> None:
    path, queries = directory / "kept", rows_of([5], 64, seed=1)[0]
    rows = rows_of(spread(40), 64)
    single, sharded = both(rows)
    sharded.save(path)
    sharded.add(rows[RANK])
    before = sorted(entry.name for entry in path.iterdir())
    save = raising(OSError("the disk is full")) if RANK == 1 else sharded._shard.save
    with replaced(sharded._shard, "save", save), raises(OSError, RuntimeError, 1, "the disk is full"):
        sharded.save(path)
    dist.barrier()
    assert sorted(entry.name for entry in path.iterdir()) == before
    assert_equal_searches(single, ShardedBinaryIndex.load(path), queries, 3)
    for module, name in ((sharded_module, "publish"), (os, "replace")):
        # rank 0 alone names the shards, after all have written them
        real = getattr(module, name)

        def fail_on_manifest(*arguments: object, **options: object) -> object:
            if RANK == 0 and (name == "publish" or "shards.json" in str(arguments[1])):  # noqa: B023
                raise OSError("the disk is full")
            return real(*arguments, **options)  # noqa: B023

        with replaced(module, name, fail_on_manifest), raises(OSError, RuntimeError, 0, "the disk is full"):
            sharded.save(path)
        assert_equal_searches(single, ShardedBinaryIndex.load(path), queries, 3)
    dist.barrier()
    sharded.save(path)
    assert ShardedBinaryIndex.load(path).ntotal == 2 * single.ntotal
    names = json.loads((path / "shards.json").read_text())["shards"]
    assert sorted(entry.name for entry in path.iterdir()) == [*names, "shards.json"]


@case
def load_refuses(directory: Path) -> None:
    path = directory / "refused"
    _, sharded = both(rows_of(spread(40), 64))
    with raises(ValueError, ValueError, 0, "save: the index must have a dim"):
        ShardedBinaryIndex().save(path)
    with raises(FileNotFoundError, FileNotFoundError, 0, "load:", "shards.json"):
        ShardedBinaryIndex.load(path)
    sharded.save(path)
    text = (path / "shards.json").read_text()
    dist.barrier()
    manifest = json.loads(text)
    altered = [
        (text[:-9], "truncated or altered"),
        ("[]", "is no sharded index"),
        (json.dumps({**manifest, "format": "other"}), "is no sharded index"),
        (json.dumps({**manifest, "version": 9}), "must have format version 1, got 9"),
        (json.dumps({**manifest, "counts": []}), "as many counts as shards"),
        (json.dumps({**manifest, "shards": ["../elsewhere"] * SIZE}), "other names than save gives"),
        (json.dumps({**manifest, "counts": [1] * SIZE}), "does not hold what shards.json says"),
        (json.dumps({**manifest, "dim": 8}), "does not hold what shards.json says"),
    ]
    for content, message in altered:
        if RANK == 0:
            (path / "shards.json").write_text(content)
        dist.barrier()
        with raises(ValueError, ValueError, 0, "load:", message):
            ShardedBinaryIndex.load(path)
        dist.barrier()


@case
def load_refuses_another_number_of_ranks(directory: Path) -> None:
    other = directory.parent / "2" / "saved"
    if SIZE == 3:
        words = "holds 2 shards and must be loaded by as many processes, got 3", "--nproc_per_node=2"
        with raises(ValueError, ValueError, 0, *words):
            ShardedBinaryIndex.load(other)


def killed() -> None:
    """Rank 1 is killed between two searches; rank 0 says what it heard, and how soon."""
    _, sharded = both(rows_of(spread(40), 64))
    queries = rows_of([5], 64, seed=1)[0]
    sharded.search(queries, 3)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    report(lambda: sharded.search(queries, 3))
    report(lambda: sharded.search(queries, 3))


def silent() -> None:
    """Rank 1 goes on living and calls nothing."""
    sharded = ShardedBinaryIndex(64, timeout=4)
    if RANK == 1:
        time.sleep(180)
    report(lambda: sharded.search(rows_of([5], 64)[0], 3))
    report(lambda: ShardedBinaryIndex(64, timeout=4))


def report(call: Callable[[], object]) -> None:
    start = time.monotonic()
    try:
        call()
        print("no error", flush=True)
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), time.monotonic() - start]), flush=True)


def run_cases(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    outcomes = {}
    for name, function in CASES.items():
        if DEVICE != "cpu" and not name.startswith("equals"):
            continue
        try:
            function(directory)
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
            break  # the ranks may be out of step now
    (directory / f"outcomes-{RANK}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if sys.argv[1] in ("killed", "silent"):
        globals()[sys.argv[1]]()
        os._exit(0)  # without waiting for the other
    run_cases(Path(sys.argv[1]))
    dist.destroy_process_group()
