"""Where a slice goes, by number of adapters: one adapter, several together, and where none can."""

from __future__ import annotations

import random
import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

from virtfabric.model.adapter import Adapter, AdapterBooks, AdapterId, SliceSpec
from virtfabric.model.errors import Refusal
from virtfabric.model.units import GIB, Bytes
from virtfabric.policy import slicing
from virtfabric.policy.slicepool import PoolChoice, SlicePool

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZES = (1, 100, 1000, 10_000)
SINGLE_MS = 1.0
COMBINED_MS = 10.0
ROUNDS = 200
AES = "crypto.aes"


def make_pool(count: int, draw: random.Random) -> tuple[SlicePool, list[AdapterBooks]]:
    """Cards of three kinds, each filled with zero to five slices of different priorities."""
    books = []
    for number in range(count):
        kind = number % 3
        one = AdapterBooks(
            Adapter(
                AdapterId(f"card-{number:05}"), (16, 32, 64)[kind], Bytes((16, 32, 64)[kind] * GIB),
                16, 15, 100_000, {AES: 4} if kind else {}, f"node:{number % 8}",
            )
        )  # fmt: skip
        for _ in range(draw.randrange(6)):
            promise = slicing.reserve(one, _small(draw), holder="guest", reclaim=False)
            if isinstance(promise, slicing.Promise):
                done = slicing.commit(promise.books, promise.reservation.id)
                one = one if isinstance(done, Refusal) else done
        books.append(one)
    return SlicePool(books), books


def _small(draw: random.Random) -> SliceSpec:
    return SliceSpec(
        draw.randint(1, 12), Bytes(draw.randint(1, 12) * GIB), lanes=draw.choice((0, 1, 4)),
        priority=draw.choice((10, 50, 90)),
    ).check()  # fmt: skip


def _single(draw: random.Random) -> SliceSpec:
    aes = draw.random() < 0.5
    return SliceSpec(
        draw.randint(1, 8), Bytes(draw.randint(1, 8) * GIB), contiguous=draw.random() < 0.5,
        lanes=draw.choice((0, 4)), capability=AES if aes else "", units=int(aes), priority=60,
        bandwidth=1000,
    ).check()  # fmt: skip


def _large(draw: random.Random) -> SliceSpec:
    return SliceSpec(
        draw.randint(70, 250), Bytes(draw.randint(70, 250) * GIB), lanes=4, capability=AES,
        units=draw.randint(1, 12), priority=60,
    ).check()  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """Median and 99th percentile of a decision and of the index's update after it.

    In CPU time: a decision waits for nothing, and so the figures hold on a busy machine as well.
    """
    rows, sizes = [], {}
    for count in SIZES:
        draw = random.Random(count)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        pool, books = make_pool(count, draw)
        held = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        by_serial = {one.adapter.serial: one for one in books}
        singles = list(_timed(pool, [_single(draw) for _ in range(ROUNDS)]))
        rows += _rows(f"slice on one of {count} adapters", singles, SINGLE_MS)
        if count > 1:
            combined = list(_timed(pool, [_large(draw) for _ in range(ROUNDS)]))
            rows += _rows(f"slice on several of {count} adapters", combined, COMBINED_MS)
        updates = list(_updates(pool, by_serial, draw))
        rows += _rows(f"slice made on one of {count} adapters, index updated", updates, SINGLE_MS)
        sizes[count] = held / count / 1024
        rows.append({
            "what": f"memory for each of {count} adapters", "value": round(held / count / 1024, 1),
            "unit": "KiB", "target": 32, "met": held / count / 1024 <= 32,
        })  # fmt: skip
    growth = sizes[SIZES[-1]] / sizes[SIZES[1]]
    rows.append({
        "what": f"memory for each of {SIZES[-1]} adapters, as a part of that for each of "
        f"{SIZES[1]} (1: linear)", "value": round(growth, 2), "unit": "", "target": 1.2,
        "met": growth <= 1.2,
    })  # fmt: skip
    return rows


def _timed(pool: SlicePool, specs: list[SliceSpec]) -> Iterator[tuple[float, int]]:
    """Milliseconds, and how many adapters it came to (0: refused)."""
    for spec in specs:
        began = time.thread_time()
        choice = pool.choose(spec, near=("node:3", "node:2"), reclaim=False)
        took = (time.thread_time() - began) * 1e3
        yield took, len(choice.parts) if isinstance(choice, PoolChoice) else 0


def _updates(
    pool: SlicePool, books: dict[AdapterId, AdapterBooks], draw: random.Random
) -> Iterator[tuple[float, int]]:
    for _ in range(ROUNDS):
        spec = _single(draw)
        began = time.thread_time()
        choice = pool.choose(spec, reclaim=False)
        if isinstance(choice, PoolChoice):
            for part in choice.parts:
                promise = slicing.reserve(books[part.adapter], part.spec, reclaim=False)
                if isinstance(promise, slicing.Promise):
                    books[part.adapter] = promise.books
                    pool.put(promise.books)
        yield (time.thread_time() - began) * 1e3, isinstance(choice, PoolChoice)


def _rows(what: str, samples: list[tuple[float, int]], target: float) -> list[dict[str, Any]]:
    times = sorted(took for took, _ in samples)
    cards = [parts for _, parts in samples if parts]
    median, p99 = statistics.median(times), times[int(len(times) * 0.99) - 1]
    return [
        {
            "what": f"{what}, {name}", "value": round(value, 3), "unit": "ms", "target": target,
            "met": value < target, "granted": len(cards), "adapters": max(cards, default=0),
        }
        for name, value in (("median", median), ("p99", p99))
    ]  # fmt: skip
