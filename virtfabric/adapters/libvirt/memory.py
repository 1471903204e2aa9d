"""Handlers of the steps that move memory: virtio-mem, balloon, NUMA nodes.

`<current>` and the balloon's `actual` are believed, never what was requested.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import libvirt
from lxml import etree

from virtfabric.adapters.libvirt.handler import LibvirtHandler, LibvirtSetting
from virtfabric.adapters.libvirt.residence import bound_size
from virtfabric.adapters.libvirt.stats import read_told
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.parse import parse_xml
from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    Reason,
    Refusal,
    RefusedError,
    ShortfallError,
    VerificationError,
)
from virtfabric.model.plan import ResizeVirtioMem, SetBalloon, SetNodeset
from virtfabric.model.units import MIB, Bytes, CpuSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtfabric.model.guest import GuestState, VirtioMem
    from virtfabric.ports import StepContext

_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE
_RESTRICTIVE: Final = libvirt.VIR_DOMAIN_NUMATUNE_MEM_RESTRICTIVE
# Growing costs the guest about 1/64 of the growth in free memory, so a large one is taken in
# steps. Not in smaller ones: QEMU tells of a size at most once a second (measured with 7.2: every
# request but the first in a second is seen 1 s later, whatever its size).
_GROWTH_STEP: Final = 512 * MIB
# Within the tolerance but not exact, and no movement for longer than QEMU's interval of telling.
_SETTLED_S: Final = 1.5
_UNDO_WAIT_S: Final = 2.0
# What a guest must keep free when its balloon is inflated: below that Linux kills processes, and
# a guest that has none left to kill panics (measured).
_BALLOON_MARGIN: Final = 8 * MIB


class _Settling:
    """Judges the way to a target: exact, or close enough and still."""

    def __init__(self, target: int, tolerance: int) -> None:
        self._target = target
        self._tolerance = tolerance
        self._last: int | None = None
        self._since = 0.0

    def is_reached(self, value: int) -> bool:
        """Whether nothing more is to be expected of a guest at `value` now."""
        now = time.monotonic()
        if value != self._last:
            self._last, self._since = value, now
        if value == self._target:
            return True
        close = abs(value - self._target) <= self._tolerance
        return close and now - self._since >= _SETTLED_S


def _report(context: StepContext, name: str, before: int, after: int) -> Callable[[int], None]:
    """Progress for every size seen: `batch: 192MiB of 256MiB returned`."""
    whole = abs(after - before)
    word = "added" if after > before else "returned"
    last: list[int] = []

    def seen(current: int) -> None:
        if last[-1:] == [current] or not whole:
            return
        last.append(current)
        moved = min(whole, max(0, (current - before) if after > before else (before - current)))
        context.progress(moved / whole, f"{name}: {Bytes(moved)} of {Bytes(whole)} {word}")

    return seen


class VirtioMemHandler(LibvirtHandler[ResizeVirtioMem]):
    """Carries out `ResizeVirtioMem`."""

    step_type = ResizeVirtioMem

    def bring_about(self, step: ResizeVirtioMem, context: StepContext) -> None:
        """What comes of CXL memory must come from the device's node; see `move`."""
        if step.tier == "cxl":
            self._insist_on_home(step)
        self.move(step, context)

    def move(self, step: ResizeVirtioMem, context: StepContext) -> None:
        """Request, and wait until the guest has followed."""
        until = time.monotonic() + step.deadline_s
        seen = _report(context, step.name, step.before, step.after)

        def read() -> int:
            current = int(self._read(step).current)
            seen(current)
            return current

        start = self._read(step)
        for target in _choose_targets(start, step.after):
            self._request(step, target)
            settling = _Settling(target, step.tolerance)
            reached = self.host.pulse.wait_for(
                read, settling.is_reached, until=until, cancelled=context.cancelled
            )
            if abs(reached - target) > step.tolerance:
                self._stop_short(step, target)

    def _insist_on_home(self, step: ResizeVirtioMem) -> None:
        """A CXL node may have been away since the device was attached.

        Raises:
            RefusedError: what the guest would get lies elsewhere.
        """
        state = self._read_guest(step)
        device = _find(state, step.alias)
        nodes = device.host_nodes
        if not nodes or step.after <= device.current:
            return
        due = sum(int(one.size) for one in state.virtio_mem if one.host_nodes == nodes)
        if bound_size(self.host.proc, self.find_pid(step), nodes) < due:
            detail = (
                f"{step.name}: {step.alias} was attached before node {nodes} went away and came "
                "back, and the kernel binds it to others since; detach it, then ask again "
                f"(virtfabric memory reclaim {min(nodes)} --detach)"
            )
            raise RefusedError(Refusal(Reason.NO_MECHANISM, detail))

    def _stop_short(self, step: ResizeVirtioMem, target: int) -> None:
        """Ask for what is there already, so that nothing more moves by itself later."""
        self._request(step, int(self._read(step).current))
        reached = int(self._read(step).current)
        if abs(reached - step.after) <= step.tolerance:  # it came at the last moment
            self._request(step, step.after)
            return
        raise ShortfallError(
            f"{step.name}: virtio-mem {step.alias} is at {Bytes(reached)} of {Bytes(target)} "
            f"after {step.deadline_s:g} s",
            reached=reached,
        )

    def check(self, step: ResizeVirtioMem) -> None:
        """The guest's real size is within the tolerance, and no other is requested."""
        device = self._read(step)
        if abs(device.current - step.after) > step.tolerance:
            raise VerificationError(
                f"{step.name}: virtio-mem {step.alias}: {Bytes(step.after)} expected, "
                f"{device.current} found"
            )
        if device.requested != step.after:
            raise VerificationError(
                f"{step.name}: virtio-mem {step.alias}: a request of {Bytes(step.after)} "
                f"expected, {device.requested} found"
            )

    def give_back(self, step: ResizeVirtioMem) -> int:
        """Request `before` at once; what the guest keeps beyond it is the residue."""
        self._request(step, step.before)
        settling = _Settling(step.before, 0)
        current = self.host.pulse.wait_for(
            lambda: int(self._read(step).current),
            settling.is_reached,
            until=time.monotonic() + _UNDO_WAIT_S,
        )
        return max(0, current - step.before)

    def _read(self, step: ResizeVirtioMem) -> VirtioMem:
        return _find(self._read_guest(step), step.alias)

    def _read_guest(self, step: ResizeVirtioMem) -> GuestState:
        with self.host.connection.domain(step.guest) as dom:
            state = parse_domain(dom.XMLDesc(0), None)
        if not state.active:  # a persistent guest's definition outlives it
            raise GuestGoneError(f"{state.name}: is not running any more")
        return state

    def _request(self, step: ResizeVirtioMem, size: int) -> None:
        """Libvirt wants the live element, address included; the alias alone is refused."""
        with self.host.connection.domain(step.guest) as dom:
            dom.updateDeviceFlags(_format_request(dom.XMLDesc(0), step.alias, size), _LIVE)


def _find(state: GuestState, alias: str) -> VirtioMem:
    for device in state.virtio_mem:
        if device.alias == alias:
            return device
    raise HypervisorError(f"{state.name}: no virtio-mem device {alias}")


def _choose_targets(device: VirtioMem, after: int) -> list[int]:
    """Sizes to request one after the other; shrinking goes in one, as it needs no memory."""
    if after <= device.current:
        return [after]
    stride = max(_GROWTH_STEP // device.block, 1) * device.block if device.block else _GROWTH_STEP
    return [*range(int(device.current) + stride, after, stride), after]


def _format_request(domain_xml: str, alias: str, size: int) -> str:
    root = parse_xml(domain_xml, what="domain XML")
    if root.get("id") is None:
        raise GuestGoneError(f"{root.findtext('name')}: is not running any more")
    for device in root.findall("devices/memory"):
        name, requested = device.find("alias"), device.find("target/requested")
        if name is not None and name.get("name") == alias and requested is not None:
            requested.set("unit", "KiB")
            requested.text = str(size >> 10)
            return etree.tostring(device, encoding="unicode", with_tail=False)
    raise HypervisorError(f"no virtio-mem device {alias}")


class BalloonHandler(LibvirtHandler[SetBalloon]):
    """Carries out `SetBalloon`."""

    step_type = SetBalloon

    def bring_about(self, step: SetBalloon, context: StepContext) -> None:
        """Set the target, and wait until the balloon has followed."""
        until = time.monotonic() + step.deadline_s
        target = self._choose_target(step)
        self._request(step, target)
        seen = _report(context, step.name, step.before, step.after)

        def read() -> int:
            current = self._read(step)
            seen(current)
            return current

        settling = _Settling(target, step.tolerance)
        reached = self.host.pulse.wait_for(
            read, settling.is_reached, until=until, cancelled=context.cancelled
        )
        if abs(reached - step.after) > step.tolerance:
            self._request(step, reached)
            raise ShortfallError(
                f"{step.name}: the balloon is at {Bytes(reached)} of {Bytes(step.after)}"
                + (" and the guest needs the rest" if target != step.after else ""),
                reached=reached,
            )

    def _choose_target(self, step: SetBalloon) -> int:
        """`after`, or what the guest can give without running out of memory.

        Only where it tells (`<stats period=...>` in its definition): a balloon takes what it is
        told to, and a guest without memory dies.
        """
        with self.host.connection.domain(step.guest) as dom:
            stats = dom.memoryStats()
        told = read_told(stats)
        actual = int(stats.get("actual", 0)) << 10
        if told is None or step.after >= actual:
            return step.after
        spare = max(0, told.usable - _BALLOON_MARGIN)
        return max(step.after, actual - spare)

    def check(self, step: SetBalloon) -> None:
        """QEMU's balloon has the size, within the tolerance."""
        actual = self._read(step)
        if abs(actual - step.after) > step.tolerance:
            raise VerificationError(
                f"{step.name}: balloon: {Bytes(step.after)} expected, {Bytes(actual)} found"
            )

    def give_back(self, step: SetBalloon) -> int:
        """Set `before` at once; what the guest keeps beyond it is the residue."""
        self._request(step, step.before)
        settling = _Settling(step.before, 0)
        actual = self.host.pulse.wait_for(
            lambda: self._read(step), settling.is_reached, until=time.monotonic() + _UNDO_WAIT_S
        )
        return max(0, actual - step.before)

    def _read(self, step: SetBalloon) -> int:
        with self.host.connection.domain(step.guest) as dom:
            actual = dom.memoryStats().get("actual")
        if actual is None:
            raise HypervisorError(f"{step.name}: QEMU tells no size of a balloon")
        return int(actual) << 10

    def _request(self, step: SetBalloon, size: int) -> None:
        with self.host.connection.domain(step.guest) as dom:
            dom.setMemoryFlags(size >> 10, _LIVE)


class NodesetHandler(LibvirtSetting[SetNodeset]):
    """Carries out `SetNodeset`; libvirt takes it for a `restrictive` guest only."""

    step_type = SetNodeset

    def put(self, step: SetNodeset) -> None:
        """Let the kernel move all of the guest's memory (cpuset.memory_migrate)."""
        with self.host.connection.domain(step.guest) as dom:
            # libvirt would take it for a guest without <numatune>, make that `strict`, and then
            # refuse the way back (measured with 9.0).
            if dom.numaParameters(_LIVE).get("numa_mode") != _RESTRICTIVE:
                raise HypervisorError(f"{step.name}: only a restrictive guest's memory can move")
            dom.setNumaParameters({"numa_nodeset": str(step.after)}, _LIVE)

    def check(self, step: SetNodeset) -> None:
        """QEMU may allocate there only, and libvirt says so too."""
        pid = self.find_pid(step)
        allowed = self.host.processes.read_nodes(pid, pid)
        if allowed != step.after:
            raise VerificationError(
                f"{step.name}: memory on node {step.after} expected, {allowed} allowed"
            )
        with self.host.connection.domain(step.guest) as dom:
            said = _read_nodeset(dom)
        if said != step.after:
            raise VerificationError(f"{step.name}: node {step.after} expected, {said} in libvirt")


def _read_nodeset(dom: Any) -> CpuSet:
    return CpuSet.parse(dom.numaParameters(_LIVE).get("numa_nodeset", ""), field="numa_nodeset")
