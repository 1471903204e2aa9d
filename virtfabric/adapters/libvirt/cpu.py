"""Handlers of the steps that change CPU: vCPU count, pins, cap and weight.

Pins, cap and weight are the host's and take effect at once; a vCPU count needs the guest.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import libvirt

from virtfabric.adapters.libvirt.handler import LibvirtHandler, LibvirtSetting, S, has_code
from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    ShortfallError,
    VerificationError,
)
from virtfabric.model.plan import (
    PinEmulator,
    PinVcpu,
    SetQuota,
    SetShares,
    SetVcpuCount,
)
from virtfabric.model.units import CpuSet

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from virtfabric.model.step import Step
    from virtfabric.ports import StepContext

_LIVE: Final = libvirt.VIR_DOMAIN_AFFECT_LIVE
_PERIOD_US: Final = 100_000
_LEAST_QUOTA_US: Final = 1_000
"""kernel/sched/core.c, min_cfs_quota_period; libvirt refuses less."""
_UNDO_WAIT_S: Final = 6.0
"""libvirt itself waits 5 s for an unplug before it gives up."""


class VcpuCountHandler(LibvirtHandler[SetVcpuCount]):
    """Carries out `SetVcpuCount`; QEMU's threads are the measure, not libvirt's count."""

    step_type = SetVcpuCount

    def bring_about(self, step: SetVcpuCount, context: StepContext) -> None:
        """Plug or unplug, and wait for the threads."""
        until = time.monotonic() + step.deadline_s
        if step.after > len(self.read_threads(step)):
            self._plug(step, step.after, until, context.cancelled)
        else:
            reached = self._unplug(step, step.after, until, context.cancelled)
            if reached > step.after:
                raise ShortfallError(
                    f"{step.name}: {reached} vCPUs online, {step.after} asked for: the guest does "
                    "not let go",
                    reached=reached,
                )

    def _plug(
        self, step: SetVcpuCount, count: int, until: float, cancelled: threading.Event | None
    ) -> None:
        with self.host.connection.domain(step.guest) as dom:
            if dom.vcpusFlags(_LIVE) >= count:
                raise HypervisorError(
                    f"{step.name}: libvirt counts vCPUs that have left the guest already",
                    advice="restart libvirtd; it counts them anew and guests go on",
                )
            dom.setVcpusFlags(count, _LIVE)
        reached = self._wait(step, lambda found: found >= count, until, cancelled)
        if reached < count:
            raise ShortfallError(f"{step.name}: {reached} of {count} vCPUs came", reached=reached)

    def _unplug(
        self, step: SetVcpuCount, count: int, until: float, cancelled: threading.Event | None
    ) -> int:
        """Ask the guest to let vCPUs go; the number of threads in the end.

        libvirt waits 5 s for each and then fails, though the vCPU may leave moments later, and
        QEMU tells nobody (measured: libvirt 9.0, QEMU 7.2 under TCG). So after a failure the
        threads are watched until the deadline.

        Under TCG nothing is asked: the vCPU leaves, but libvirt counts it until it is restarted,
        and the next plug kills QEMU (measured: libvirt 9.0, QEMU 7.2, SIGSEGV in device_add).
        """
        threads = self.read_threads(step)
        if len(threads) <= count or self.host.processes.is_emulated(threads):
            return len(threads)
        try:
            with self.host.connection.domain(step.guest) as dom:
                dom.setVcpusFlags(count, _LIVE)
        except (GuestGoneError, HypervisorGoneError):
            raise
        except HypervisorError as error:
            if not has_code(
                error, libvirt.VIR_ERR_OPERATION_TIMEOUT
            ):  # such as: the vCPUs of the start cannot be unplugged
                return len(self.read_threads(step))
        return self._wait(step, lambda found: found <= count, until, cancelled)

    def _wait(
        self,
        step: SetVcpuCount,
        done: Callable[[int], bool],
        until: float,
        cancelled: threading.Event | None,
    ) -> int:
        return self.host.pulse.wait_for(
            lambda: len(self.read_threads(step)), done, until=until, cancelled=cancelled
        )

    def check(self, step: SetVcpuCount) -> None:
        """QEMU has as many vCPU threads."""
        found = len(self.read_threads(step))
        if found != step.after:
            raise VerificationError(
                f"{step.name}: {step.after} vCPU threads expected, {found} found"
            )

    def give_back(self, step: SetVcpuCount) -> int:
        """Unplug what was plugged, within 6 s, or plug again what had left."""
        until = time.monotonic() + _UNDO_WAIT_S
        if len(self.read_threads(step)) >= step.before:
            return max(0, self._unplug(step, step.before, until, None) - step.before)
        self._plug(step, step.before, until, None)
        return 0


class _PinHandler(LibvirtSetting[S]):
    """What both kinds of pins share."""

    def format_cpumap(self, cpus: CpuSet, pid: int) -> tuple[bool, ...]:
        """libvirt's map, one entry for each pCPU there can be; empty `cpus` are any."""
        chosen = cpus or self.choose_any(pid)
        return tuple(number in chosen for number in range(max(chosen | self._online()) + 1))

    def choose_any(self, pid: int) -> CpuSet:
        """Where a thread that nobody pinned may run: what the guest's control group allows."""
        try:
            return self.host.cgroups.read_cpus(pid) or self._online()
        except VerificationError:  # no cpuset controller here
            return self._online()

    def check_affinity(self, step: Step, what: str, pid: int, tid: int, cpus: CpuSet) -> None:
        """Compare with the scheduler's view of one thread."""
        wanted = CpuSet((cpus or self.choose_any(pid)) & self._online())
        found = self.host.processes.read_affinity(pid, tid)
        if found != wanted:
            raise VerificationError(
                f"{step.name}: {what} on pCPU {wanted} expected, thread {tid} may run on {found}"
            )

    def _online(self) -> CpuSet:
        return self.host.sysfs.read_online()


class PinVcpuHandler(_PinHandler[PinVcpu]):
    """Carries out `PinVcpu`; a vCPU that is not plugged is left alone."""

    step_type = PinVcpu

    def put(self, step: PinVcpu) -> None:
        """Pin the thread."""
        pid = self.find_pid(step)
        if step.vcpu not in self.host.processes.read_vcpu_threads(pid):
            return
        cpumap = self.format_cpumap(step.after, pid)
        with self.host.connection.domain(step.guest) as dom:
            dom.pinVcpuFlags(step.vcpu, cpumap, _LIVE)

    def check(self, step: PinVcpu) -> None:
        """The scheduler lets the thread run there and nowhere else."""
        pid = self.find_pid(step)
        tid = self.host.processes.read_vcpu_threads(pid).get(step.vcpu)
        if tid is not None:
            self.check_affinity(step, f"vCPU {step.vcpu}", pid, tid, step.after)


class PinEmulatorHandler(_PinHandler[PinEmulator]):
    """Carries out `PinEmulator`."""

    step_type = PinEmulator

    def put(self, step: PinEmulator) -> None:
        """Pin every thread that is neither a vCPU's nor an I/O thread."""
        cpumap = self.format_cpumap(step.after, self.find_pid(step))
        with self.host.connection.domain(step.guest) as dom:
            dom.pinEmulator(cpumap, _LIVE)

    def check(self, step: PinEmulator) -> None:
        """QEMU's main thread may run there and nowhere else."""
        pid = self.find_pid(step)
        self.check_affinity(step, "emulator", pid, pid, step.after)


class QuotaHandler(LibvirtSetting[SetQuota]):
    """Carries out `SetQuota`, for the whole guest: `vcpu_quota` would be for each vCPU."""

    step_type = SetQuota

    def put(self, step: SetQuota) -> None:
        """Set period and quota."""
        quota = _choose_quota_us(step.after)
        values = {"global_quota": quota} if quota < 0 else {
            "global_period": _PERIOD_US, "global_quota": quota,
        }  # fmt: skip
        with self.host.connection.domain(step.guest) as dom:
            dom.setSchedulerParametersFlags(values, _LIVE)

    def check(self, step: SetQuota) -> None:
        """The kernel caps the guest's group at this."""
        quota = _choose_quota_us(step.after)
        wanted = -1 if quota < 0 else quota * 1000 // _PERIOD_US
        found = self.host.cgroups.read_quota(self.find_pid(step))
        if found != wanted:
            raise VerificationError(
                f"{step.name}: a cap of {wanted} milli-CPU expected, {found} in its cgroup"
            )


def _choose_quota_us(millicpu: int) -> int:
    return -1 if millicpu < 0 else max(_LEAST_QUOTA_US, millicpu * _PERIOD_US // 1000)


class SharesHandler(LibvirtSetting[SetShares]):
    """Carries out `SetShares`."""

    step_type = SetShares

    def put(self, step: SetShares) -> None:
        """Set the weight in the units of this host's cgroups."""
        raw = self.host.cgroups.from_shares(step.after)
        with self.host.connection.domain(step.guest) as dom:
            dom.setSchedulerParametersFlags({"cpu_shares": raw}, _LIVE)

    def check(self, step: SetShares) -> None:
        """The kernel weighs the guest's group like this."""
        wanted = self.host.cgroups.from_shares(step.after)
        found = self.host.cgroups.read_raw_shares(self.find_pid(step))
        if wanted not in found:
            raise VerificationError(
                f"{step.name}: a weight of {wanted} expected, {sorted(found)} in its cgroup"
            )
