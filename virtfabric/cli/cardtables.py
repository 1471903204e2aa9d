"""Documents of `cards` and `slices` (docs/dbus-api.md) -> tables and lines; pure."""

from __future__ import annotations

from typing import Any

from virtfabric.cli.screen import Table
from virtfabric.model.units import Bytes

Json = dict[str, Any]

_FOREIGN = "another host's"


def card_table(cards: list[Json]) -> Table:
    """Every card: what it has, what is free of it, and how its link is."""
    rows = tuple(
        (
            card["serial"], _link(card), _of(card, "site"), _share(card, "cores"),
            _memory(card), _share(card, "lanes"), _accelerators(card), str(card["slices"]),
            card["why"],
        )
        for card in cards
    )  # fmt: skip
    columns = (
        "card", "link", "site", "cores free", "memory free", "lanes free", "accelerators free",
        "slices", "why",
    )  # fmt: skip
    return Table("cards", columns, rows, frozenset({"slices"}))


def slice_table(slices: list[Json]) -> Table:
    """Every slice of every card."""
    rows = tuple(
        (
            f"{one['card']}/{one['id']}", one["spec"]["name"] or "-", one["wish"] or _FOREIGN,
            _content(one), str(one["spec"]["qos"]["priority"]), _holder(one),
            _program(one),
        )
        for one in slices
    )  # fmt: skip
    columns = ("slice", "name", "part of", "has", "priority", "with", "program")
    return Table("slices", columns, rows, frozenset({"priority"}))


def card_lines(card: Json) -> list[str]:
    """One card, in words."""
    lines = [f"card {card['serial']}: {card['condition']}"]
    if card["why"]:
        lines.append(f"  {card['why']}")
    if card.get("arbiter"):
        lines.append(
            "  decides about CPU and memory of this host"
            if card["deciding"]
            else "  is to decide about CPU and memory of this host, and does not"
        )
    adapter = card["adapter"]
    if adapter is None:
        return lines
    able = ", ".join(f"{n} {kind}" for kind, n in sorted(adapter["accelerators"].items()))
    lines += [
        f"  {card['software']}, started as {card['boot']}, generation {card['generation']}",
        f"  {adapter['cores']} cores, {Bytes(adapter['memory'])}, {adapter['lanes']} lanes, "
        f"{adapter['keys']} keys, {adapter['bandwidth']} Mbit/s, at {adapter['site'] or 'no site'}",
        f"  accelerators: {able or 'none'}",
        f"  promises that wait for their commit: {card['promises']}",
    ]
    for subject, values in sorted(card["readings"].items()):
        figures = ", ".join(f"{name} {value}" for name, value in sorted(values.items()))
        lines.append(f"  measured, {subject}: {figures}")
    return lines


def _holder(one: Json) -> str:
    idle = one.get("idle_s")
    who = one["holder_name"] or "nobody"
    return who if idle is None else f"{who}, idle {round(idle / 60)} min"


def _link(card: Json) -> str:
    return f"{card['condition']}, decides" if card.get("deciding") else str(card["condition"])


def arbiter_lines(arbiter: Json) -> list[str]:
    """Who decides about allocations; nothing where no card is to."""
    if arbiter["mode"] == "own":
        return []
    if arbiter["deciding"]:
        return [f"card {arbiter['card']} decides about CPU and memory"]
    instead = {"own": "the agent decides by itself", "refuse": "allocations are refused"}
    return [
        f"card {arbiter['card']} is to decide about CPU and memory and does not "
        f"({arbiter['why']}): {instead[arbiter['fallback']]}"
    ]


def _of(card: Json, name: str) -> str:
    return str(card["adapter"][name] or "-") if card["adapter"] else "-"


def _share(card: Json, name: str) -> str:
    if card["adapter"] is None:
        return "-"
    return f"{card['free'].get(name, 0)} of {card['adapter'][name]}"


def _memory(card: Json) -> str:
    if card["adapter"] is None:
        return "-"
    free, all_ = card["free"].get("memory", 0), card["adapter"]["memory"]
    return f"{Bytes(free).rounded()} of {Bytes(all_).rounded()}"


def _accelerators(card: Json) -> str:
    if card["adapter"] is None:
        return "-"
    free = card["free"]["accelerators"]
    kinds = sorted(card["adapter"]["accelerators"].items())
    return ", ".join(f"{kind} {free.get(kind, 0)} of {n}" for kind, n in kinds) or "none"


def _content(one: Json) -> str:
    spec = one["spec"]
    parts = (
        f"{spec['cores']} cores" if spec["cores"] else "",
        Bytes(spec["memory"]).rounded() if spec["memory"] else "",
        f"x{spec['lanes']}" if spec["lanes"] else "",
        f"{spec['units']} {spec['capability']}" if spec["units"] else "",
    )
    return ", ".join(filter(None, parts))


def _program(one: Json) -> str:
    if not one["known"]:
        return "unknown, the card is away"
    if not one["spec"]["units"]:
        return "-"
    return f"{one['phase']}, {one['image']}" if one["image"] else str(one["phase"])
