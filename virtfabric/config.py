"""The configuration: `/etc/virtfabric/*.toml` checked into frozen dataclasses.

Every value is checked when it is read; an error names file, key and value. What depends on the
machine (do these pCPUs exist?) is checked by `resolve_capacity`.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.configcards import KEYS as CARD_KEYS
from virtfabric.configcards import CardsConfig, read_cards
from virtfabric.configdevices import read_pools
from virtfabric.configvalues import (
    Check,
    Source,
    check_command,
    check_cpu,
    check_cpus,
    check_group,
    check_path,
    check_priority,
    check_seconds,
    check_size,
    check_switch,
    check_text,
    check_user,
)
from virtfabric.model.amounts import CPU, MEMORY, Amounts, Key, Tier
from virtfabric.model.errors import ConfigError
from virtfabric.model.host import Capacity, HostTopology
from virtfabric.model.request import Offerable
from virtfabric.model.units import MIB, Bytes, CpuSet, MilliCpu

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtfabric.model.device import DevicePool
    from virtfabric.model.host import NumaNode

CONFIG_DIR: Final = Path("/etc/virtfabric")
MIN_RESERVE: Final = Bytes(256 * MIB)
RESERVE_PERCENT: Final = 5
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
EVERYBODY: Final = "*"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """`[agent]`. `bus` empty is the system bus; `syslog` empty exports no audit heads.

    Attributes:
        restart_libvirt: command that restarts libvirtd, so that it learns of a new NUMA node;
            empty: nobody restarts it but the operator.
    """

    uri: str = "qemu:///system"
    state_dir: Path = Path("/var/lib/virtfabric")
    run_dir: Path = Path("/run/virtfabric")
    bus: str = ""
    log_level: str = "info"
    hook_socket: Path = Path("/run/virtfabric/hook.sock")
    sample_interval_s: float = 1.0
    drift_interval_s: float = 30.0
    syslog: str = "/dev/log"
    restart_libvirt: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CapacityConfig:
    """`[capacity]`. None leaves it to `resolve_capacity`.

    Attributes:
        memory: bytes of DRAM in all, spread over its nodes in proportion to their size; CXL nodes
            give nothing then.
        memory_by_node: bytes by node id; nodes that are not named give nothing, and those that are
            not there yet count when they come.
    """

    cpus: CpuSet | None = None
    housekeeping: CpuSet | None = None
    memory: Bytes | None = None
    memory_by_node: Mapping[int, Bytes] | None = None
    reserve: Bytes | None = None
    overhead: Bytes = Bytes(96 * MIB)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """`[memory]`. `lend_ballooned`: nothing enforces a balloon against a hostile guest."""

    lend_ballooned: bool = False
    deadline_s: float = 30.0


@dataclass(frozen=True, slots=True)
class PrincipalConfig:
    """`[[access.principal]]`: the bounds of one user (name, uid, or `*` for all others)."""

    user: str
    max_priority: int = 100
    max_cpu: MilliCpu | None = None
    max_memory: Bytes | None = None

    @property
    def ceiling(self) -> Offerable:
        """The bounds as authorisation knows them; a resource that is not named has none."""
        bounds = {CPU: self.max_cpu, MEMORY: self.max_memory}  # of every tier together
        amounts = Amounts({Key(r): v for r, v in bounds.items() if v is not None})
        return Offerable(self.max_priority, amounts or None)


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """`[access]`. `group` is a name (it need not exist) or a gid in digits; empty for none."""

    group: str = "virtfabric"
    principals: tuple[PrincipalConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class Config:
    """The whole configuration; `Config()` is what an empty file means.

    `pools` is `[[device]]`, in the order in which it was read.
    """

    agent: AgentConfig = field(default_factory=AgentConfig)
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    pools: tuple[DevicePool, ...] = ()
    cards: CardsConfig = field(default_factory=CardsConfig)

    def ceiling_for(self, uid: int, name: str) -> Offerable:
        """The bounds of a user: by name, by uid, by `*`; root without an entry has none."""
        by_user = {p.user: p for p in self.access.principals}
        users = (name, str(uid)) if uid == 0 else (name, str(uid), EVERYBODY)
        found = next((by_user[u] for u in users if u in by_user), None)
        return found.ceiling if found else Offerable()


_KEYS: Final[Mapping[str, Mapping[str, Check]]] = {
    "agent": {
        "uri": check_text,
        "state_dir": check_path,
        "run_dir": check_path,
        "bus": partial(check_text, empty=True),
        "log_level": partial(check_text, choices=LOG_LEVELS),
        "hook_socket": check_path,
        "sample_interval_s": partial(check_seconds, least=0.05, most=3600),
        "drift_interval_s": partial(check_seconds, least=0.05, most=86400),
        "syslog": partial(check_text, empty=True),
        "restart_libvirt": check_command,
    },
    "capacity": {
        "cpus": check_cpus,
        "housekeeping": check_cpus,
        "memory": check_size,
        "reserve": partial(check_size, zero=True),
        "overhead": partial(check_size, zero=True),
    },
    "memory": {
        "lend_ballooned": check_switch,
        "deadline_s": partial(check_seconds, least=0.1, most=3600),
    },
    "access": {"group": check_group, "principal": lambda value: value},
    "cards": CARD_KEYS,
}
_PRINCIPAL: Final[Mapping[str, Check]] = {
    "user": check_user,
    "max_priority": check_priority,
    "max_cpu": check_cpu,
    "max_memory": check_size,
}
_NODE: Final = re.compile(r"node([0-9]{1,4})")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Checks the values of one source (a file, or the options) and adds them to `found`."""

    source: Source
    found: dict[str, dict[str, Any]]

    def read(self, document: Mapping[str, Any]) -> None:
        for section, table in document.items():
            if section == "device":
                self._read_pools(table)
                continue
            known = self.source.known(section, section, table, _KEYS)
            if not isinstance(table, dict):
                problem = f"is not a table; write it as [{section}]"
                raise self.source.fail(section, table, problem)
            for name, value in table.items():
                self._read_key(section, name, value, known)

    def _read_key(self, section: str, name: str, value: Any, known: Mapping[str, Check]) -> None:
        key = f"{section}.{name}"
        check = self.source.known(key, name, value, known)
        target = self.found.setdefault(section, {})
        if key == "cards.card":
            cards = target.setdefault("cards", [])
            cards += read_cards(self.source, value, cards)
        elif key == "access.principal":
            target.setdefault("principals", []).extend(self._principals(value))
        elif key == "capacity.memory" and isinstance(value, dict):
            target["memory_by_node"] = self._nodes(value)
            target.pop("memory", None)
        else:
            target[name] = self.source.check(key, value, check)
            if key == "capacity.memory":
                target.pop("memory_by_node", None)

    def _read_pools(self, value: Any) -> None:
        pools = self.found.setdefault("device", {}).setdefault("pools", [])
        pools += read_pools(self.source, value, pools)

    def _nodes(self, table: Mapping[str, Any]) -> dict[int, Bytes]:
        nodes = {}
        for name, value in table.items():
            key = f"capacity.memory.{name}"
            match = _NODE.fullmatch(name)
            if match is None:
                raise self.source.fail(key, value, "is not a known key; write node0, node1...")
            nodes[int(match[1])] = self.source.check(key, value, check_size)
        return nodes

    def _principals(self, value: Any) -> list[PrincipalConfig]:
        entries = self.source.tables("access.principal", value)
        return [self._principal(number, entry) for number, entry in enumerate(entries, 1)]

    def _principal(self, number: int, entry: Mapping[str, Any]) -> PrincipalConfig:
        place = f"access.principal[{number}]"
        values = self.source.table(place, entry, _PRINCIPAL)
        if "user" not in values:
            raise self.source.fail(place, entry, "has no user")
        return PrincipalConfig(**values)


def _files(source: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(source, Path):
        return list(source)
    if source == CONFIG_DIR and not source.exists():
        return []  # Not configured: the defaults hold.
    return sorted(source.glob("*.toml")) if source.is_dir() else [source]


def _parse_file(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


def load_config(
    source: Path | Sequence[Path] = CONFIG_DIR, overrides: Mapping[str, object] | None = None
) -> Config:
    """Read the configuration.

    Args:
        source: a directory (its `*.toml` in name order), a file, or files. A later file overrides
            single keys of an earlier one; `[[access.principal]]` and `[[device]]` entries add up,
            the last one of a user counts. Only the default directory may be missing.
        overrides: values by dotted key (`agent.uri`), from command-line options.

    Raises:
        ConfigError: names file, key and value.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in _files(source):
        _Reader(Source(str(path)), found).read(_parse_file(path))
    for key, value in (overrides or {}).items():
        section, _, name = key.partition(".")
        plain = str(value) if isinstance(value, Path) else value
        _Reader(Source("option"), found).read({section: {name: plain}})
    return _build(found)


def _build(found: Mapping[str, dict[str, Any]]) -> Config:
    agent = dict(found.get("agent", {}))
    if "run_dir" in agent:
        agent.setdefault("hook_socket", agent["run_dir"] / "hook.sock")
    access = dict(found.get("access", {}))
    if "principals" in access:
        last = {p.user: p for p in access["principals"]}
        access["principals"] = tuple(last.values())
    cards = found.get("cards", {})
    return Config(
        AgentConfig(**agent),
        CapacityConfig(**found.get("capacity", {})),
        MemoryConfig(**found.get("memory", {})),
        AccessConfig(**access),
        tuple(found.get("device", {}).get("pools", ())),
        CardsConfig(**{**cards, "cards": tuple(cards.get("cards", ()))}),
    )


def resolve_capacity(config: Config, topology: HostTopology) -> Capacity:
    """What `[capacity]` means on this machine.

    `cpus` is every pCPU unless given; `housekeeping` the first core among `cpus`; `memory` all of
    each node; `reserve` the larger of 256 MiB and 5 % of the DRAM in it. What is of a CXL node
    counts for that tier, and nothing of it is held back.

    Raises:
        ConfigError: a pCPU that is not there, more DRAM than there is, or a reserve that leaves
            nothing.
    """
    section = config.capacity
    cpus = _existing("cpus", section.cpus or topology.cpus, topology)
    first = next((core & cpus for core in topology.cores if core & cpus), frozenset[int]())
    housekeeping = _existing("housekeeping", section.housekeeping or CpuSet(first), topology)
    by_node = _memory_by_node(section, topology)
    cxl = {n: amount for n, amount in by_node.items() if n in topology.cxl_nodes}
    memory = {n: amount for n, amount in by_node.items() if n not in cxl}
    absent = (section.memory_by_node or {}).keys() - topology.nodes.keys()
    withheld = dict.fromkeys(sorted(absent), "the host has no such node; it counts when it comes")
    total = sum(memory.values())
    reserve = section.reserve
    if reserve is None:
        reserve = max(MIN_RESERVE, Bytes(total * RESERVE_PERCENT // 100))
    if reserve >= total:
        raise ConfigError(
            f"capacity.reserve = {reserve} leaves nothing of capacity.memory = {Bytes(total)}",
            advice=f"the host has no node {CpuSet(absent)}" if absent else "",
        )
    return Capacity(cpus, housekeeping, memory, reserve, section.overhead, cxl, withheld)


def _existing(name: str, cpus: CpuSet, topology: HostTopology) -> CpuSet:
    missing = CpuSet(cpus - topology.cpus)
    if missing:
        raise ConfigError(
            f"capacity.{name} = '{cpus}' names pCPU {missing}, which the host does not have",
            advice=f"online are {topology.cpus}",
        )
    return cpus


def _memory_by_node(section: CapacityConfig, topology: HostTopology) -> dict[int, Bytes]:
    nodes = topology.nodes
    if section.memory_by_node is not None:
        return {
            number: _there_of(topology.nodes[number], amount)
            for number, amount in section.memory_by_node.items()
            if number in nodes
        }
    if section.memory is None:
        return {number: node.memory_total for number, node in nodes.items()}
    dram = {number: node for number, node in nodes.items() if number not in topology.cxl_nodes}
    there = Bytes(sum(node.memory_total for node in dram.values()))
    if section.memory > there:
        raise ConfigError(f"capacity.memory = {section.memory} is more than the host's {there}")
    return _spread(section.memory, dram, there)


def _there_of(node: NumaNode, amount: Bytes) -> Bytes:
    """So much of a node; of a CXL node what there is of it by now, as it comes block by block."""
    if node.tier == Tier.CXL:
        return min(amount, node.memory_total)
    if amount > node.memory_total:
        key = f"capacity.memory.node{node.number} = {amount}"
        raise ConfigError(f"{key} is more than the node's {node.memory_total}")
    return amount


def _spread(amount: Bytes, nodes: Mapping[int, NumaNode], there: Bytes) -> dict[int, Bytes]:
    """In proportion to node size; the sum is exact, since each share ends where the next begins."""
    spread, seen, given = {}, 0, 0
    for number, node in sorted(nodes.items()):
        seen += node.memory_total
        upto = int(amount) * seen // there
        spread[number] = Bytes(upto - given)
        given = upto
    return spread
