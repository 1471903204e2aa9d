"""`[[device]]` of the configuration: which functions have a capability, and what a grant sets up.

Owns the keys of these tables and what must not be said together. Whether the machine has such
functions is not checked here: they may come by hot-plug.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from virtfabric.configvalues import WrongValueError, check_parsed, check_switch, check_text
from virtfabric.model.capability import parse_capability
from virtfabric.model.device import DevicePool, Match, PciAddress, VfSettings
from virtfabric.model.profile import Profile, ProfileFile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtfabric.configvalues import Check, Source

_IDS: Final = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}")
_CLASS: Final = re.compile(r"[0-9a-f]{2}([0-9a-f]{2}){0,2}")
_DRIVER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_SPEED: Final = re.compile(r"([0-9]+(?:\.5)?) ?GT/s")
LINK_SPEEDS: Final = (2500, 5000, 8000, 16000, 32000, 64000)
"""MT/s of PCIe generations 1 to 6."""
MOST_WORD: Final = 64
"""Characters of a profile's value."""
MAX_VFS: Final = 65535
"""NumVFs is a register of 16 bits. Source: PCIe 6.0, section 9.3.3.7."""


def _address(value: Any) -> PciAddress:
    address: PciAddress = check_parsed(value, PciAddress.parse)
    return address


def _capability(value: Any) -> str:
    return str(check_parsed(value, parse_capability))


def _some(value: Any, check: Callable[[Any], Any]) -> frozenset[Any]:
    """One value, or a list of them."""
    found = [check(one) for one in (value if isinstance(value, list) else [value])]
    if not found:
        raise WrongValueError("is empty")
    twice = next((one for n, one in enumerate(found) if one in found[:n]), None)
    if twice is not None:
        raise WrongValueError(f"names {twice} twice")
    return frozenset(found)


def _form(value: Any, *, form: re.Pattern[str], problem: str) -> str:
    text = check_text(value).lower()
    if not form.fullmatch(text):
        raise WrongValueError(problem)
    return text


def _driver(value: Any) -> str:
    text = check_text(value)
    if not _DRIVER.fullmatch(text):
        raise WrongValueError("is not the name of a driver")
    return text


def _file(value: Any) -> ProfileFile:
    file: ProfileFile = check_parsed(value, ProfileFile.parse)
    return file


def _word(value: Any) -> str:
    """What is written to the file of a profile, and read back without the blanks around it."""
    text = check_text(value)
    if not text.isprintable() or text != text.strip():
        raise WrongValueError("is not printable text without blanks around it")
    if len(text) > MOST_WORD:
        raise WrongValueError(f"is longer than {MOST_WORD} characters")
    return text


def _count(value: Any, *, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise WrongValueError(f"is not a whole number from 1 to {most}")
    return value


def _speed(value: Any) -> int:
    match = _SPEED.fullmatch(check_text(value))
    speed = int(float(match[1]) * 1000) if match else 0
    if speed not in LINK_SPEEDS:
        known = ", ".join(f"{s / 1000:g}GT/s" for s in LINK_SPEEDS)
        raise WrongValueError(f"is not one of {known}")
    return speed


def _setting(value: Any, *, name: str) -> Any:
    """One of `VfSettings`, by the rules that it has itself."""
    word = ("on" if value else "off") if isinstance(value, bool) else str(value)
    kinds = {"mac": str, "trust": bool, "spoofchk": bool}
    kind = kinds.get(name, int)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "text", bool: "true or false", int: "a whole number"}
        raise WrongValueError(f"is not {words[kind]}")
    if "," in word:
        raise WrongValueError("is out of range")
    settings = check_parsed(f"{name}={word}", VfSettings.parse)
    return getattr(settings, name)


_MATCH: Final[Mapping[str, Check]] = {
    "address": partial(_some, check=_address),
    "ids": partial(
        _some, check=partial(_form, form=_IDS, problem="is not vendor:device, like 8086:10ca")
    ),
    "class": partial(_form, form=_CLASS, problem="is not 2, 4 or 6 hexadecimal digits, like 0200"),
    "pf": _address,
    "vfs": check_switch,
    "driver": _driver,
}
_VF: Final[Mapping[str, Check]] = {
    name: partial(_setting, name=name) for name in ("mac", "vlan", "trust", "spoofchk", "rate")
}
_PROFILE: Final[Mapping[str, Check]] = {"file": _file, "value": _word, "none": _word}
_POOL: Final[Mapping[str, Check]] = {
    "capability": _capability,
    "match": lambda value: value,
    "vf": lambda value: value,
    "vf_count": partial(_count, most=MAX_VFS),
    "nvme_queues": partial(_count, most=65535),
    "one_time_use": check_switch,
    "link_speed": _speed,
    "vfio_driver": _driver,
    "profile": lambda value: value,
}
_FIELDS: Final = {"address": "addresses", "class": "class_prefix"}
"""Names in `Match` that differ from the keys."""


def read_pools(source: Source, value: Any, others: Sequence[DevicePool]) -> list[DevicePool]:
    """The pools of one file.

    Args:
        source: the file.
        value: what it has under `device`.
        others: pools read before: none may be there twice.

    Raises:
        ConfigError: names file, key and value.
    """
    pools: list[DevicePool] = []
    for number, entry in enumerate(source.tables("device", value), 1):
        place = f"device[{number}]"
        pool = _read_pool(source, place, entry)
        _check_doubles(source, place, pool, (*others, *pools))
        pools.append(pool)
    return pools


def _read_pool(source: Source, place: str, entry: dict[str, Any]) -> DevicePool:
    values = source.table(place, entry, _POOL)
    for name in ("capability", "match"):
        if name not in values:
            raise source.fail(place, entry, f"has no {name}")
    found = source.table(f"{place}.match", values.pop("match"), _MATCH)
    if not found:
        raise source.fail(f"{place}.match", {}, "has no condition: every function would be in it")
    match = Match(**{_FIELDS.get(name, name): v for name, v in found.items()})
    settings = VfSettings(**source.table(f"{place}.vf", values.pop("vf", {}), _VF))
    if "profile" in values:
        values["profile"] = _read_profile(source, f"{place}.profile", values["profile"])
    _check_sense(source, place, match, settings, values)
    return DevicePool(match=match, settings=settings, **values)


def _read_profile(source: Source, place: str, entry: Any) -> Profile:
    values = source.table(place, entry, _PROFILE)
    for name in _PROFILE:
        if name not in values:
            raise source.fail(place, entry, f"has no {name}")
    if values["value"] == values["none"]:
        problem = "is what the file has when no guest has the function, too"
        raise source.fail(f"{place}.value", values["value"], problem)
    return Profile(**values)


def _check_sense(
    source: Source, place: str, match: Match, settings: VfSettings, values: Mapping[str, Any]
) -> None:
    """What cannot be meant."""
    if match.pf is not None and match.vfs is False:
        raise source.fail(f"{place}.match.vfs", value=False, problem="but match.pf means its VFs")
    if match.vfs is False and settings:
        raise source.fail(f"{place}.vf", str(settings), "but match.vfs = false leaves no VF")
    if settings.mac is not None and len(match.addresses) != 1:
        problem = "would be the MAC of every function of the pool; name one in match.address"
        raise source.fail(f"{place}.vf.mac", settings.mac, problem)
    if "vf_count" in values and match.pf is None:
        problem = "needs match.pf: the PF that is given so many VFs"
        raise source.fail(f"{place}.vf_count", values["vf_count"], problem)
    if "nvme_queues" in values and match.vfs is False:
        raise source.fail(f"{place}.nvme_queues", values["nvme_queues"], "is for VFs only")


def _check_doubles(
    source: Source, place: str, pool: DevicePool, others: Sequence[DevicePool]
) -> None:
    """No function twice: the order of files would decide which capability it has."""
    for other in others:
        if pool.match == other.match:
            problem = f"is the same as that of another [[device]] ({other.capability})"
            raise source.fail(f"{place}.match", _text(pool.match), problem)
        shared = sorted(pool.match.addresses & other.match.addresses)
        if shared:
            problem = f"is in another [[device]] too ({other.capability})"
            raise source.fail(f"{place}.match.address", str(shared[0]), problem)
        one_pf = pool.match.pf is not None and pool.match.pf == other.match.pf
        if one_pf and None not in (pool.vf_count, other.vf_count):
            problem = f"but another [[device]] gives {pool.match.pf} {other.vf_count} VFs"
            raise source.fail(f"{place}.vf_count", pool.vf_count, problem)


def _text(match: Match) -> str:
    """Its conditions, for a message."""
    words = []
    for key in _MATCH:
        value = getattr(match, _FIELDS.get(key, key))
        if value not in ("", None, frozenset()):
            shown = " ".join(sorted(value)) if isinstance(value, frozenset) else value
            words.append(f"{key} {shown}")
    return ", ".join(words)
