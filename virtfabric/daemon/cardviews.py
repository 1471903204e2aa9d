"""What `cards`, `card show` and `slices` show: cards as last told of -> JSON-ready values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from virtfabric.model.card import SliceProgram
from virtfabric.policy.seating import free_of
from virtfabric.policy.slicing import would_fit
from virtfabric.protocol.adapterforms import form_of_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from virtfabric.model.adapter import AdapterId, Slice
    from virtfabric.model.card import CardView, HeldSlice

    Json = dict[str, Any]


def card_view(view: CardView, arbiter: Json) -> Json:
    """One card; what it has is None where it was never there.

    Args:
        view: as last told.
        arbiter: who decides about the host, as `daemon.arbitration` shows it.
    """
    appointed = arbiter["card"] == view.serial
    shown: Json = {
        "serial": view.serial, "condition": view.condition.value, "why": view.why,
        "boot": view.boot, "software": view.software, "adapter": None, "free": None,
        "slices": 0, "promises": 0, "generation": None, "arbiter": appointed,
        "deciding": appointed and arbiter["deciding"],
    }  # fmt: skip
    if view.books is None:
        return shown
    adapter, free = view.books.adapter, free_of(view.books)
    units = {kind: len(numbers) for kind, numbers in free.units.items()}
    return shown | {
        "adapter": {
            "cores": adapter.cores, "memory": int(adapter.memory), "lanes": adapter.lanes,
            "keys": adapter.keys, "bandwidth": adapter.bandwidth,
            "accelerators": dict(adapter.accelerators), "site": adapter.site,
        },
        "free": would_fit(free.vector("")) | {"accelerators": units},
        "slices": len(view.books.slices), "promises": len(view.books.reservations),
        "generation": view.books.generation,
    }  # fmt: skip


def slices_view(
    cards: Mapping[AdapterId, CardView],
    held: Mapping[str, HeldSlice],
    name_of: Callable[[str], str],
    idle: Mapping[str, float],
) -> list[Json]:
    """Every slice of every card, other hosts' too; those of a lost card as it was last seen."""
    return [
        slice_view(view, one, held.get(one.request), name_of, idle)
        for view in cards.values()
        for one in (view.books.slices.values() if view.books else ())
    ]


def slice_view(
    view: CardView, one: Slice, held: HeldSlice | None, name_of: Callable[[str], str],
    idle: Mapping[str, float],
) -> Json:  # fmt: skip
    """One slice; `wish` is what it is a part of, None for another host's.

    `idle` are seconds for which nobody has used slices, by key.
    """
    program = view.programs.get(one.id, SliceProgram())
    return form_of_slice(one) | {
        "card": view.serial, "known": view.is_usable, "wish": held.wish if held else None,
        "holder_name": name_of(one.holder) if one.holder else "",
        "phase": program.phase.value, "image": program.image,
        "idle_s": round(idle[one.request]) if one.request in idle else None,
    }  # fmt: skip


def plan_texts(steps: Iterable[Any]) -> list[Json]:
    """Steps as `--dry-run` shows them."""
    return [{"text": str(step), "data": step.to_json()} for step in steps]
