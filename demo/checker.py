"""The demo's judge: looks at kernel, libvirt and guest, and asks the agent nothing.

It imports nothing from virtfabric, so that a fault there cannot hide here. What it believes:

* /proc: affinity of QEMU's vCPU threads, by thread name (`CPU 0/TCG`, `CPU 1/KVM`);
* cgroup files, version 1 or 2: the guest's CPU quota and weight;
* `virsh dumpxml`: vCPUs plugged, virtio-mem requested and current;
* the guest: its own count of CPUs and MemTotal, as it prints them on its console.

It does not change anything. Expected values come from whoever asks, never from the agent's records.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MIB = 1 << 20
# What virtio-mem may stick short of (two of its smallest steps in Linux), see docs/architecture.md.
MEMORY_TOLERANCE = 4 * MIB
_UNITS = {"b": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_VCPU_THREAD = re.compile(r"CPU (\d+)/(?:TCG|KVM)")
PATIENCE = float(os.environ.get("VIRTFABRIC_PATIENCE", "1"))
"""Factor on every deadline here: more on a slow machine (see docs/testing.md)."""
_POLL_S = 0.1 * PATIENCE


class CheckerError(Exception):
    """Something cannot be observed; the message says what."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the guests live.

    Attributes:
        prefix: command words that run the rest of a command line there; () for this host.
        pid: a process there, as this host counts; its PID namespace tells guests of one name
            apart. None: QEMU is looked for everywhere.
    """

    prefix: tuple[str, ...] = ()
    pid: int | None = None


def enter_namespaces(pid: int) -> Place:
    """The place of a process in namespaces of its own."""
    namespaces = ("-m", "-u", "-i", "-n", "-p", "-C")
    return Place(("nsenter", "-t", str(pid), *namespaces, "--"), pid)


@dataclass(frozen=True, slots=True)
class GuestReport:
    """The last line that the guest printed about itself; `count` is how many it has printed."""

    count: int
    uptime_s: float
    online: frozenset[int]
    memory: int

    @property
    def memory_mib(self) -> float:
        """MemTotal."""
        return self.memory / MIB


@dataclass(frozen=True, slots=True)
class Observation:
    """A guest at one moment, by sources that are not the agent.

    Attributes:
        affinity: pCPUs that each vCPU thread may run on, by vCPU number.
        quota: milli-CPU of the guest's whole cgroup, None when uncapped.
        weight: its cpu.shares (cgroup v1) or cpu.weight (v2).
        cpuset: what its vCPU groups allow, by vCPU number.
        vcpus: plugged, by the live XML.
        requested, current: bytes of the virtio-mem devices, by the live XML.
        report: None until the guest has spoken.
    """

    guest: str
    pid: int
    affinity: dict[int, frozenset[int]]
    quota: int | None
    weight: int
    cpuset: dict[int, frozenset[int]]
    vcpus: int
    requested: int
    current: int
    report: GuestReport | None = None

    @property
    def cpus(self) -> frozenset[int]:
        """Where any of its vCPUs may run."""
        return frozenset().union(*self.affinity.values())

    @property
    def settings(self) -> tuple[object, ...]:
        """Everything that a request may change and its undo has to bring back."""
        return (self.affinity, self.quota, self.weight, self.cpuset, self.vcpus, self.requested)


# -- reading --------------------------------------------------------------------------------------


def parse_cpu_list(text: str) -> frozenset[int]:
    """`0-1,4` as the kernel prints it."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def format_cpu_list(cpus: Iterable[int]) -> str:
    """`0-1,4`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def read_report(console: Path) -> GuestReport | None:
    """The guest's last complete VFSTAT line."""
    try:
        text = console.read_text(errors="replace")
    except OSError:
        return None
    whole = text[: text.rfind("\n") + 1]
    # The console is a terminal: kernel messages may stand before a line of ours.
    lines = re.findall(r"VFSTAT (up=\S+ online=\S+ .*memtotal_kib=\d+.*)", whole)
    if not lines:
        return None
    words = dict(word.split("=", 1) for word in lines[-1].split() if "=" in word)
    return GuestReport(
        count=len(lines),
        uptime_s=float(words["up"]),
        online=parse_cpu_list(words["online"]),
        memory=int(words["memtotal_kib"]) << 10,
    )


def find_qemu(place: Place, guest: str) -> int:
    """Process id of the guest's QEMU, as this host counts.

    Raises:
        CheckerError: there is none.
    """
    home = _read_pid_namespace(place.pid) if place.pid else None
    wanted = f"guest={guest},".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if not any(word.startswith(wanted) for word in _read_command_line(entry)):
                continue
            if home in (None, _read_pid_namespace(entry.name)):
                return int(entry.name)
    raise CheckerError(f"no QEMU process of guest {guest}")


def _read_pid_namespace(pid: int | str) -> str:
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def _read_command_line(process: Path) -> list[bytes]:
    return (process / "cmdline").read_bytes().split(b"\0")


def read_vcpu_threads(pid: int) -> dict[int, int]:
    """Thread id by vCPU number."""
    threads: dict[int, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found = _VCPU_THREAD.match((task / "comm").read_text())
            if found:
                threads[int(found[1])] = int(task.name)
    return threads


def _read_group(pid: int, controller: str) -> tuple[Path, bool]:
    """Directory of a process's (or thread's) cgroup, and whether it is of version 2."""
    unified: str | None = None
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return _locate(controller, path), False
        if number == "0":
            unified = path
    if unified is None:
        raise CheckerError(f"process {pid} is in no cgroup with {controller}")
    return _locate(None, unified), True


def _locate(controller: str | None, path: str) -> Path:
    """Where the hierarchy with `controller` (None: version 2) shows the group `path`."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        front, _, back = line.partition(" - ")
        root, target = front.split()[3:5]
        kind, _, options = back.split(" ", 2)
        fits = kind == "cgroup2" if controller is None else controller in options.split(",")
        if not fits or not kind.startswith("cgroup"):
            continue
        inside = path.removeprefix(root) if root != "/" else path
        found = Path(target) / inside.lstrip("/")
        if found.is_dir():
            return found
    raise CheckerError(f"cgroup {path} is not mounted here")


def _read_guest_group(pid: int) -> tuple[Path, bool]:
    """The group of the whole guest: libvirt puts QEMU's threads into groups one level below."""
    group, unified = _read_group(pid, "cpu")
    below = group.name == "emulator" or group.name.startswith(("vcpu", "iothread"))
    return (group.parent if below else group), unified


def read_quota(pid: int) -> int | None:
    """Milli-CPU that the kernel allows the whole guest; None when it has no cap."""
    group, unified = _read_guest_group(pid)
    if unified:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else round(1000 * int(quota) / int(period))
    quota = (group / "cpu.cfs_quota_us").read_text()
    period = (group / "cpu.cfs_period_us").read_text()
    return None if int(quota) < 0 else round(1000 * int(quota) / int(period))


def read_weight(pid: int) -> int:
    """cpu.weight (cgroup v2) or cpu.shares (v1) of the whole guest."""
    group, unified = _read_guest_group(pid)
    return int((group / ("cpu.weight" if unified else "cpu.shares")).read_text())


def _read_cpuset(thread: int) -> frozenset[int]:
    group, unified = _read_group(thread, "cpuset")
    if unified:
        return parse_cpu_list((group / "cpuset.cpus.effective").read_text())
    return parse_cpu_list((group / "cpuset.cpus").read_text())


def read_live_xml(place: Place, guest: str) -> ET.Element:
    """`virsh dumpxml`.

    Raises:
        CheckerError: virsh says no.
    """
    command = [*place.prefix, "virsh", "-c", "qemu:///system", "dumpxml", guest]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60 * PATIENCE
    )
    if done.returncode:
        raise CheckerError(f"virsh dumpxml {guest}: {done.stderr.strip()}")
    return ET.fromstring(done.stdout)


def _sum_sizes(root: ET.Element, name: str) -> int:
    found = root.findall(f"./devices/memory[@model='virtio-mem']/target/{name}")
    return sum(int(size.text or 0) * _UNITS[size.get("unit", "KiB")] for size in found)


def read_requested(root: ET.Element) -> int:
    """Bytes that the live XML requests of the guest's virtio-mem devices."""
    return _sum_sizes(root, "requested")


def _count_vcpus(root: ET.Element) -> int:
    vcpu = root.find("vcpu")
    if vcpu is None:
        raise CheckerError("the live XML has no <vcpu>")
    return int(vcpu.get("current") or vcpu.text or 0)


def observe(place: Place, guest: str, console: Path) -> Observation:
    """One guest as kernel, libvirt and the guest itself show it.

    Raises:
        CheckerError: it does not run or cannot be read.
    """
    root = read_live_xml(place, guest)
    pid = find_qemu(place, guest)
    try:
        threads = read_vcpu_threads(pid)
        return Observation(
            guest=guest,
            pid=pid,
            affinity={n: frozenset(os.sched_getaffinity(t)) for n, t in sorted(threads.items())},
            quota=read_quota(pid),
            weight=read_weight(pid),
            cpuset={n: _read_cpuset(t) for n, t in sorted(threads.items())},
            vcpus=_count_vcpus(root),
            requested=_sum_sizes(root, "requested"),
            current=_sum_sizes(root, "current"),
            report=read_report(console),
        )
    except OSError as error:
        raise CheckerError(f"guest {guest}: {error}") from error


def wait_for_news(consoles: Iterable[Path], *, timeout_s: float = 20.0, lines: int = 2) -> bool:
    """Waits until each guest has spoken again; the first new line may have been under way already.

    Returns:
        False when one of them stayed silent.
    """
    waiting = {console: _count(console) + lines for console in consoles}
    return wait_until(
        lambda: all(_count(console) >= wanted for console, wanted in waiting.items()), timeout_s
    )


def _count(console: Path) -> int:
    report = read_report(console)
    return report.count if report else 0


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Polls; False when `condition` did not hold in time (`timeout_s` times `PATIENCE`).

    What cannot be observed is not true.
    """
    deadline = time.monotonic() + timeout_s * PATIENCE
    while True:
        with contextlib.suppress(CheckerError):
            if condition():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)


# -- judging --------------------------------------------------------------------------------------

Finding = tuple[bool, str]


def _judge(what: str, wanted: str, found: str, *, ok: bool) -> Finding:
    return (ok, f"{what}: {found}" if ok else f"{what}: want {wanted}, found {found}")


def _format_cpu(milli: int | None) -> str:
    return "uncapped" if milli is None else f"{milli}m"


def expect_quota(seen: Observation, milli: int | None) -> Finding:
    """The kernel caps the whole guest at `milli` milli-CPU (within one of rounding)."""
    ok = seen.quota == milli or (
        None not in (seen.quota, milli) and abs((seen.quota or 0) - (milli or 0)) <= 1
    )
    what = f"{seen.guest}: CPU cap (cgroup)"
    return _judge(what, _format_cpu(milli), _format_cpu(seen.quota), ok=ok)


def expect_affinity(seen: Observation, cpus: Iterable[int]) -> Finding:
    """Every vCPU thread may run on exactly these pCPUs, by its affinity and by its cpuset."""
    wanted = frozenset(cpus)
    places = {*seen.affinity.values(), *seen.cpuset.values()}
    found = " and ".join(sorted(format_cpu_list(p) for p in places)) or "no vCPU thread"
    what = f"{seen.guest}: pCPUs of its vCPU threads (/proc, cpuset)"
    return _judge(what, format_cpu_list(wanted), found, ok=places == {wanted})


def expect_apart(seen: Observation, others: Sequence[Observation]) -> Finding:
    """No other guest's vCPU may run where this one's do."""
    overlap = {other.guest for other in others if other.cpus & seen.cpus}
    where = f"{seen.guest}: alone on pCPU {format_cpu_list(seen.cpus)}"
    return (not overlap, where + (f": no, also {', '.join(sorted(overlap))}" if overlap else ""))


def expect_vcpus(seen: Observation, count: int) -> Finding:
    """libvirt has `count` vCPUs plugged, and the guest has as many online."""
    online = len(seen.report.online) if seen.report else 0
    found = f"{seen.vcpus} in the live XML, {online} online in the guest"
    ok = seen.vcpus == online == count
    return _judge(f"{seen.guest}: vCPUs", str(count), found, ok=ok)


def expect_plugged(seen: Observation, size: int) -> Finding:
    """The virtio-mem device is asked for `size` bytes, and has them within the tolerance."""
    found = f"{seen.current // MIB} MiB (requested {seen.requested // MIB})"
    ok = max(abs(seen.requested - size), abs(seen.current - size)) <= MEMORY_TOLERANCE
    return _judge(f"{seen.guest}: virtio-mem (live XML)", f"{size // MIB} MiB", found, ok=ok)


def expect_guest_memory(seen: Observation, size: int) -> Finding:
    """The guest's own MemTotal is `size` bytes within the tolerance."""
    memory = seen.report.memory if seen.report else 0
    ok = abs(memory - size) <= MEMORY_TOLERANCE
    what = f"{seen.guest}: MemTotal (guest)"
    return _judge(what, f"{size / MIB:.0f} MiB", f"{memory / MIB:.0f} MiB", ok=ok)


def expect_same(seen: Observation, before: Observation) -> Finding:
    """The guest is the same process with the same settings, and has the memory it had."""
    names = ("affinity", "CPU cap", "weight", "cpuset", "vCPUs", "virtio-mem requested")
    pairs = zip(names, before.settings, seen.settings, strict=True)
    changed = [f"{name} {old} -> {new}" for name, old, new in pairs if old != new]
    if seen.pid != before.pid:
        changed.append("it was restarted")
    if abs(seen.current - before.current) > MEMORY_TOLERANCE:
        changed.append(f"virtio-mem {before.current // MIB} -> {seen.current // MIB} MiB")
    then, now = before.report, seen.report
    if then is None or now is None or now.online != then.online:
        changed.append("CPUs online in the guest")
    elif abs(now.memory - then.memory) > MEMORY_TOLERANCE:
        changed.append(f"MemTotal {then.memory_mib:.0f} -> {now.memory_mib:.0f} MiB")
    text = f"{seen.guest}: kernel, libvirt and guest show what they showed before"
    return (not changed, text if not changed else f"{seen.guest}: changed: {'; '.join(changed)}")


@dataclass(slots=True)
class Verdicts:
    """Everything that was checked so far."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> bool:
        """Takes one finding down; answers whether it was good."""
        self.findings.append(finding)
        return finding[0]

    @property
    def failed(self) -> list[str]:
        """Texts of the bad ones."""
        return [text for ok, text in self.findings if not ok]

    @property
    def exit_code(self) -> int:
        """0 only when something was checked and everything held."""
        return 0 if self.findings and not self.failed else 1
