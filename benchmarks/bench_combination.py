"""How many adapters a slice over several takes, against the fewest that there can be.

The fewest are found by OR-tools CP-SAT (`pip install -e .[bench]`) from what is in the books: it
shares no code with `policy`. Cases are random pools from which one adapter cannot give it.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from benchmarks.bench_card import AES
from virtfabric.model.adapter import Adapter, AdapterBooks, AdapterId, SliceSpec
from virtfabric.model.errors import Refusal
from virtfabric.model.units import GIB, MIB, Bytes
from virtfabric.policy import slicing
from virtfabric.policy.slicepool import PoolChoice, SlicePool

CASES = 200
TARGET_PERCENT = 1.0
_TIME_S = 20.0
"""For the solver, for each case; one that it does not prove in that is left out, and told."""


def measure() -> list[dict[str, Any]]:
    """Adapters taken in all cases beyond the fewest, in percent."""
    try:
        from ortools.sat.python import cp_model  # noqa: F401
    except ImportError:
        print("combination: needs OR-tools: pip install -e .[bench]")
        return []
    draw, seen = random.Random(5), Counter[str]()
    taken = fewest = 0
    while seen["cases"] < CASES:
        books = _draw_pool(draw)
        pool = SlicePool(books)
        spec = _draw_spec(draw, books)
        least = fewest_adapters(books, spec)
        if least == 1 or seen["not proved"] > CASES:
            continue
        if least is None:
            seen["not proved"] += 1
            continue
        choice = pool.choose(spec, reclaim=False)
        seen["cases"] += 1
        if isinstance(choice, PoolChoice) != (least > 0):
            raise SystemExit(f"feasible or not? {least} adapters against {choice} for {spec}")
        if not isinstance(choice, PoolChoice):
            seen["not to be had"] += 1
            continue
        seen["more than the fewest"] += len(choice.parts) > least
        taken, fewest = taken + len(choice.parts), fewest + least
    beyond = 100 * (taken - fewest) / fewest
    what = (
        f"adapters beyond the fewest in {CASES} random cases ({fewest} adapters; "
        f"{seen['more than the fewest']} cases with more, {seen['not to be had']} not to be had, "
        f"{seen['not proved']} left out)"
    )
    return [
        {"what": what, "value": round(beyond, 2), "unit": "%", "target": TARGET_PERCENT,
         "met": beyond <= TARGET_PERCENT}
    ]  # fmt: skip


def _draw_pool(draw: random.Random) -> list[AdapterBooks]:
    """Adapters of any shape, that the search cannot be lucky with, partly filled."""
    books = []
    for number in range(draw.randint(8, 150)):
        one = AdapterBooks(
            Adapter(
                AdapterId(f"card-{number:03}"), draw.choice((8, 16, 32, 64, 128)),
                Bytes(draw.choice((8, 16, 32, 64, 128, 256)) * GIB), draw.choice((8, 16)), 15,
                100_000, {AES: draw.randint(1, 8)} if draw.random() < 0.6 else {}, "node:0",
            )
        )  # fmt: skip
        for _ in range(draw.randrange(4)):
            spec = SliceSpec(
                draw.randint(1, 24), Bytes(draw.randint(1, 48) * GIB),
                lanes=draw.choice((0, 1, 4)), bandwidth=draw.choice((None, 20_000)),
            ).check()  # fmt: skip
            promise = slicing.reserve(one, spec, reclaim=False)
            if isinstance(promise, slicing.Promise):
                done = slicing.commit(promise.books, promise.reservation.id)
                one = one if isinstance(done, Refusal) else done
        books.append(one)
    return books


def _draw_spec(draw: random.Random, books: list[AdapterBooks]) -> SliceSpec:
    """Of each coordinate between a little and nearly all that the pool has, by itself."""
    cores = sum(free_figures(one, SliceSpec(cores=1))[0] for one in books)
    memory = sum(free_figures(one, SliceSpec(cores=1))[1] for one in books)
    units = sum(one.adapter.accelerators.get(AES, 0) for one in books)
    aes = draw.random() < 0.6 and units > 0
    return SliceSpec(
        max(1, min(1024, round(cores * draw.uniform(0.05, 0.9)))),
        Bytes(max(GIB, round(memory * draw.uniform(0.05, 0.9)) // MIB * MIB)),
        lanes=draw.choice((0, 0, 1, 4, 8)), capability=AES if aes else "",
        units=max(1, round(units * draw.uniform(0.05, 0.9))) if aes else 0, priority=60,
        bandwidth=draw.choice((None, None, 1000, 60_000)),
    ).check()  # fmt: skip


def free_figures(books: AdapterBooks, spec: SliceSpec) -> tuple[int, int, int]:
    """Cores, bytes and units that an adapter can give a part of this slice; zeros if it cannot.

    A part has lanes, keys and a bandwidth limit of its own.
    """
    adapter, seats = books.adapter, [one.seat for one in books.slices.values()]
    lanes = {lane for seat in seats for lane in seat.lanes}
    keys = sum(len(seat.keys) for seat in seats)
    bandwidth = sum(seat.bandwidth for seat in seats)
    width = spec.lanes
    has_link = not width or any(
        not lanes.intersection(range(first, first + width))
        for first in range(0, adapter.lanes - width + 1, width)
    )
    fits = adapter.keys - keys >= spec.keys and adapter.bandwidth - bandwidth >= (
        spec.bandwidth or 0
    )
    if not (has_link and fits):
        return 0, 0, 0
    used = sum(piece.size for seat in seats for piece in seat.memory)
    mine = sum(len(seat.units) for seat in seats if seat.capability == spec.capability)
    units = adapter.accelerators.get(spec.capability, 0) - mine if spec.units else 0
    cores = adapter.cores - sum(len(seat.cores) for seat in seats)
    return cores, int(adapter.memory) - used, units


def fewest_adapters(books: list[AdapterBooks], spec: SliceSpec) -> int | None:
    """0: all together are not enough; None: not proved in time."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    figures = [free_figures(one, spec) for one in books]
    chosen = [model.new_bool_var(one.adapter.serial) for one in books]
    for axis, need in enumerate((spec.cores, int(spec.memory) // MIB, spec.units)):
        scale = MIB if axis == 1 else 1
        gives = [found[axis] // scale for found in figures]
        model.add(sum(g * x for g, x in zip(gives, chosen, strict=True)) >= need)
    model.minimize(sum(chosen))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = _TIME_S
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return 0
    return round(solver.objective_value) if status == cp_model.OPTIMAL else None
