"""Turns the words of a request (as every edge passes them) into a `Request`; parses them once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from virtfabric.model.amounts import Tier
from virtfabric.model.capability import parse_capability
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.policy import (
    Admission,
    CpuPolicy,
    DevicePolicy,
    DriftAction,
    Escalation,
    Growth,
    GuestPolicy,
    MemoryPolicy,
    Placement,
    Smt,
)
from virtfabric.model.request import Origin, Principal, Request
from virtfabric.model.units import Bytes, MilliCpu
from virtfabric.model.want import (
    DEVICE,
    parse_choice,
    parse_device,
    parse_duration,
    parse_number,
    parse_tier,
    parse_want,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtfabric.model.ids import GuestId, RequestId

WANTS: Final = frozenset({"cpu", "memory", "for", "partial", "deadline", "key", "tier"})
CHANGES: Final = frozenset(
    {
        "priority", "cpu", "memory", "shares", "placement", "smt", "admission", "drift", "tiers",
        "escalate", "growth",
    }
)  # fmt: skip
MAX_DEADLINE_S: Final = 600.0
MAX_WISH: Final = 64
"""Functions of one capability that a policy can ask for."""
_RECLAIMABLE: Final = {"reclaimable": True, "kept": False}
_T = TypeVar("_T")


def _check_keys(given: Mapping[str, str], known: frozenset[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise InvalidValueError(what, key, f"is unknown; known are {', '.join(sorted(known))}")


def parse_flag(text: str, *, field: str) -> bool:
    """`yes` or `no`.

    Raises:
        InvalidValueError: anything else.
    """
    if text not in ("yes", "no"):
        raise InvalidValueError(field, text, "must be yes or no")
    return text == "yes"


def parse_tiers(text: str, *, field: str) -> tuple[str, ...]:
    """`dram,cxl`, in this order and each once.

    Raises:
        InvalidValueError: another word, or none.
    """
    given = {parse_tier(part.strip(), field=field) for part in text.split(",")}
    return tuple(tier.value for tier in Tier if tier in given)


def parse_request(
    request: RequestId,
    guest: GuestId,
    principal: Principal,
    wants: Mapping[str, str],
    *,
    default_deadline_s: float,
) -> Request:
    """A request as D-Bus and the command carry it.

    Raises:
        InvalidValueError: names the field and the value.
    """
    devices = {k: v for k, v in wants.items() if k.startswith(DEVICE)}
    _check_keys({k: v for k, v in wants.items() if k not in devices}, WANTS, "request")
    if "cpu" not in wants and "memory" not in wants and not devices:
        raise InvalidValueError("request", dict(wants), "asks for no cpu, memory or device")
    if "tier" in wants and "memory" not in wants:
        raise InvalidValueError("tier", wants["tier"], "is of memory, and no memory is asked for")
    deadline = default_deadline_s
    if "deadline" in wants:
        deadline = parse_duration(wants["deadline"], field="deadline")
        if deadline > MAX_DEADLINE_S:
            raise InvalidValueError("deadline", wants["deadline"], "is above 10 minutes")
    return Request(
        id=request,
        guest=guest,
        principal=principal,
        origin=Origin.DBUS,
        cpu=parse_want(wants["cpu"], MilliCpu.parse, field="cpu") if "cpu" in wants else None,
        memory=parse_want(wants["memory"], Bytes.parse, field="memory")
        if "memory" in wants
        else None,
        devices=dict(parse_device(*item) for item in devices.items()),
        lease_s=parse_duration(wants["for"], field="for") if "for" in wants else None,
        partial=parse_flag(wants.get("partial", "no"), field="partial"),
        deadline_s=deadline,
        key=wants.get("key", ""),
        tier=parse_tier(wants["tier"], field="tier") if "tier" in wants else None,
    )


def _range(text: str, parse: Callable[..., _T], *, field: str) -> tuple[_T, _T | None]:
    low, colon, high = text.partition(":")
    reservation = parse(low or "0", field=f"{field}.reservation")
    limit = parse(high, field=f"{field}.limit") if colon and high else None
    return reservation, limit


def parse_wish(key: str, text: str, old: DevicePolicy | None) -> DevicePolicy | None:
    """`device:net.vf` and `2`, `2:reclaimable`, `reclaimable` or `kept`; what is absent stays.

    Returns:
        What the policy says of the capability afterwards; None for nothing (`0`).

    Raises:
        InvalidValueError: names the field.
    """
    capability = parse_capability(key.removeprefix(DEVICE), field="device")
    wish = old or DevicePolicy(capability)
    first, *rest = text.split(":")
    words = rest if first.isdecimal() else [first, *rest]
    if first.isdecimal():
        count = parse_number(first, 0, MAX_WISH, field=key)
        if not count and not rest:
            return None
        wish = replace(wish, count=count)
    if len(words) > 1 or not wish.count or not _RECLAIMABLE.keys() >= set(words):
        raise InvalidValueError(
            key, text, f"must be a number up to {MAX_WISH}, reclaimable, kept, or both",
            advice="like 2, 2:reclaimable or kept; 0 alone removes it",
        )  # fmt: skip
    return replace(wish, reclaimable=_RECLAIMABLE[words[0]]) if words else wish


def _parse_wishes(
    old: tuple[DevicePolicy, ...], changes: Mapping[str, str]
) -> tuple[DevicePolicy, ...]:
    """What a policy asks for afterwards: in its order, new capabilities last."""
    known = {f"{DEVICE}{wish.capability}": wish for wish in reversed(old)}
    changed = {key: parse_wish(key, text, known.get(key)) for key, text in changes.items()}
    kept = (wish for wish in old if f"{DEVICE}{wish.capability}" not in changed)
    new = (wish for wish in changed.values() if wish is not None)
    places = {wish.capability: n for n, wish in reversed(list(enumerate(old)))}
    return tuple(sorted((*kept, *new), key=lambda w: places.get(w.capability, len(old))))


def parse_policy_changes(old: GuestPolicy | None, changes: Mapping[str, str]) -> GuestPolicy:
    """The policy after `changes` (the words of `virtfabric policy set`).

    Raises:
        InvalidValueError: names the field and the value; limit below reservation included.
    """
    wishes = {k: v for k, v in changes.items() if k.startswith(DEVICE)}
    _check_keys({k: v for k, v in changes.items() if k not in wishes}, CHANGES, "policy")
    base = old or GuestPolicy()
    cpu, memory = base.cpu, base.memory
    cpu_range = (cpu.reservation, cpu.limit)
    memory_range = (memory.reservation, memory.limit)
    if "cpu" in changes:
        cpu_range = _range(changes["cpu"], MilliCpu.parse, field="cpu")
    if "memory" in changes:
        memory_range = _range(changes["memory"], Bytes.parse, field="memory")
    for field, (low, high) in (("cpu", cpu_range), ("memory", memory_range)):
        if high is not None and high < low:
            raise InvalidValueError(f"{field}.limit", str(high), f"is below the reservation {low}")
    shares = (
        parse_number(changes["shares"], 1, 10_000, field="shares") if "shares" in changes else 0
    )
    placement = changes.get("placement", cpu.placement.value)
    tiers = memory.tiers
    if "tiers" in changes:
        tiers = parse_tiers(changes["tiers"], field="tiers")
    return GuestPolicy(
        priority=parse_number(
            changes.get("priority", str(base.priority)), 0, 100, field="priority"
        ),
        admission=parse_choice(
            Admission, changes.get("admission", base.admission.value), field="admission"
        ),
        drift=parse_choice(DriftAction, changes.get("drift", base.drift.value), field="drift"),
        cpu=CpuPolicy(
            *cpu_range,
            shares=shares or cpu.shares,
            placement=parse_choice(Placement, placement, field="placement"),
            smt=parse_choice(Smt, changes.get("smt", cpu.smt.value), field="smt"),
        ),
        memory=MemoryPolicy(
            *memory_range,
            shares=shares or memory.shares,
            tiers=tiers,
            escalate=parse_choice(
                Escalation, changes.get("escalate", memory.escalate.value), field="escalate"
            ),
            growth=parse_choice(Growth, changes.get("growth", memory.growth.value), field="growth"),
        ),
        devices=_parse_wishes(base.devices, wishes),
    )
