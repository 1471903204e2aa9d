"""How memdevs do: health and poison lists, asked of the devices by `cxl list`.

Sysfs has neither: health is a mailbox command, and a poison list comes as trace events.
Source: cxl-list(1) of ndctl, `--health` and `--media-errors` (v80).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.cxl import Condition, PoisonRecord
from virtfabric.model.errors import CxlError

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

    from virtfabric.adapters.cxl.tools import Tool

_ASK_S: Final = 300.0
"""A poison list takes long: 7 s for each memdev were measured in an emulated host."""
_LIST: Final = ("cxl", "list", "--memdevs", "--health", "--media-errors")
_HEALTH_ONLY: Final = ("cxl", "list", "--memdevs", "--health")
_UNKNOWN: Final = "unknown option"
"""What `cxl` before v80 says, which knows no poison (parse-options.c of ndctl)."""
_MOST: Final = 1024
"""Poison records of a memdev that are shown."""


def read_conditions(run: Tool, cancelled: threading.Event) -> dict[str, Condition]:
    """By the kernel's name of the memdev.

    Raises:
        CxlError: the program is not there, or does not answer.
        StepCancelledError: nobody waits for it any more.
    """
    try:
        said = run(_LIST, deadline_s=_ASK_S, cancelled=cancelled)
    except CxlError as error:
        # Any other failure must not pass for a memdev without poison: quarantine ends by this.
        if _UNKNOWN not in str(error):
            raise
        said = run(_HEALTH_ONLY, deadline_s=_ASK_S, cancelled=cancelled)
    return parse_conditions(said)


def parse_conditions(text: str) -> dict[str, Condition]:
    """Read the output of `cxl list`; what a device says wrongly is left out.

    Raises:
        CxlError: it is not what `cxl list` prints.
    """
    try:
        listed = json.loads(text or "[]")
        # One memdev alone is printed without a list by some versions.
        entries = listed if isinstance(listed, list) else [listed]
        return {str(entry["memdev"]): _condition(entry) for entry in entries}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CxlError(f"cxl list prints something unknown: {error}") from error


def _condition(entry: Mapping[str, Any]) -> Condition:
    errors = entry.get("media_errors") or ()
    return Condition(
        health=_health(entry.get("health")),
        poison=tuple(
            PoisonRecord(e["offset"], e["length"], str(e.get("source", "")))
            for e in errors[:_MOST]
            if isinstance(e.get("offset"), int) and isinstance(e.get("length"), int)
        ),
    )


def _health(told: Mapping[str, Any] | None) -> str:
    """`ok`, or what is wrong; empty where a device tells nothing.

    Source: util_cxl_memdev_health_to_json, cxl/json.c: flags of what is wrong but for one, and
    states that are normal, warning, critical or unknown.
    """
    if not told:
        return ""
    wrong = [name for name, value in told.items() if value is True and name != _FINE]
    wrong += [f"{name} {value}" for name, value in told.items() if value in _GRAVE]
    return ", ".join(wrong).replace("_", " ").replace("ext ", "") or "ok"


_FINE: Final = "media_normal"
_GRAVE: Final = ("warning", "critical")
