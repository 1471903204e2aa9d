"""Step handlers of a simulated host: one for each step type of `model.plan`.

They change what libvirt says and, unless a fault is in the way, what the kernel shows; `verify`
looks at the kernel's side only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from virtfabric.adapters.simulated.faults import Effect, Phase, SimulatedCrash
from virtfabric.adapters.simulated.guest import (
    PERIOD_US,
    Hardware,
    SimulatedGuest,
    read_policy,
    write_policy,
)
from virtfabric.model.errors import (
    DeviceError,
    GuestGoneError,
    HypervisorError,
    InvalidValueError,
    ShortfallError,
    StepCancelledError,
    VerificationError,
)
from virtfabric.model.mark import MARK_NAMESPACE
from virtfabric.model.plan import (
    Definition,
    MarkPins,
    PinEmulator,
    PinVcpu,
    ResizeVirtioMem,
    SetBalloon,
    SetNodeset,
    SetPolicy,
    SetQuota,
    SetShares,
    SetVcpuCount,
)
from virtfabric.model.policy import DEFAULT_SHARES
from virtfabric.model.step import Step
from virtfabric.model.units import Bytes, CpuSet
from virtfabric.ports import EventKind

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.faults import Fault
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.ports import StepContext, StepHandler

S = TypeVar("S", bound=Step)
_POLL_S: Final = 0.002


class SimulatedHandler(Generic[S]):
    """Faults, locking and events; a subclass knows what its step changes."""

    kind: str
    step_type: type[S]
    event: EventKind | None = EventKind.TUNABLE
    """What libvirt tells of such a change; None for nothing."""
    event_detail = ""
    of_host = False
    """Whether it changes the host alone: neither guest nor libvirt is missed."""

    def __init__(self, host: SimulatedHost) -> None:
        self.host = host
        self.kind = self.step_type.kind

    def apply(self, step: Step, context: StepContext) -> None:
        """Bring about `step.after`."""
        own = self._own(step)
        lost = self._occasion(Phase.APPLY, own, context)
        with self.host.lock:
            try:
                self.change(own, lost=lost)
            finally:
                self._tell(own)
        context.progress(1.0, own.describe())
        self._occasion(Phase.APPLIED, own, context)

    def verify(self, step: Step) -> None:
        """Look at the kernel's side."""
        own = self._own(step)
        self._occasion(Phase.VERIFY, own)
        with self.host.lock:
            if problem := self.compare(own):
                raise VerificationError(f"{own.describe()}: {problem}")
        self._occasion(Phase.VERIFIED, own)

    def undo(self, step: Step) -> int:
        """Restore `step.before`; what the guest keeps is the residue."""
        own = self._own(step)
        try:
            self._occasion(Phase.UNDO, own)
            with self.host.lock:
                left = self.restore(own)
                self._tell(own)
            self._occasion(Phase.UNDONE, own)
        except GuestGoneError:
            return 0
        return left

    def change(self, step: S, *, lost: bool) -> None:
        """Change to `after`; `lost`: only what libvirt says."""
        self.bring(self.find(step), step, lost=lost)

    def compare(self, step: S) -> str:
        """How the kernel differs from `after`; empty when it does not."""
        return self.differs(self.find(step), step)

    def restore(self, step: S) -> int:
        """Change to `before`; what remains."""
        return self.give_back(self.find(step), step)

    def find(self, step: S) -> SimulatedGuest:
        """The guest, which has to run and to take changes."""
        return self.host.changeable(step.guest)

    def bring(self, guest: SimulatedGuest, step: S, *, lost: bool) -> None:
        """Change to `after`; `lost`: only what libvirt says."""
        raise NotImplementedError

    def differs(self, guest: SimulatedGuest, step: S) -> str:
        """How the kernel differs from `after`; empty when it does not."""
        raise NotImplementedError

    def give_back(self, guest: SimulatedGuest, step: S) -> int:
        """Change to `before`; what remains."""
        raise NotImplementedError

    def _tell(self, step: S) -> None:
        if self.event is not None:
            self.host.tell(self.event, step.guest, self.event_detail)

    def _own(self, step: Step) -> S:
        if not isinstance(step, self.step_type):
            raise InvalidValueError(
                "step.kind", step.kind, f"is not for the handler of {self.kind}"
            )
        return step

    def _occasion(self, phase: Phase, step: Step, context: StepContext | None = None) -> bool:
        """Let a fault strike; True when the change is to be lost."""
        fault = self.host.faults.strike(phase, step)
        if fault is None:
            return False
        if fault.effect is Effect.HOLD:
            self._hold(fault, step, context)
        elif fault.effect is not Effect.LOSE:
            self._break(fault.effect, phase, step)
        return fault.effect is Effect.LOSE

    def _break(self, effect: Effect, phase: Phase, step: Step) -> None:
        if effect is Effect.CRASH:
            raise SimulatedCrash(f"{phase} of {step.describe()}")
        if effect is Effect.VANISH:
            self.host.stop_guest(step.guest)
        if effect is Effect.DISCONNECT:
            self.host.disconnect()
        if not self.of_host:
            self.host.running(step.guest)  # raises for the two above
        elif effect is not Effect.FAIL:
            return
        if phase in (Phase.VERIFY, Phase.VERIFIED):
            raise VerificationError(f"{step.describe()}: the kernel shows something else")
        failure = DeviceError if self.of_host else HypervisorError
        raise failure(f"{step.describe()}: internal error: simulated")

    def _hold(self, fault: Fault, step: Step, context: StepContext | None) -> None:
        deadline = self.host.clock.monotonic() + getattr(step, "deadline_s", float("inf"))
        while not fault.gate.wait(_POLL_S):
            if context is not None and context.cancelled.is_set():
                raise StepCancelledError(f"{step.describe()}: cancelled")
            if self.host.clock.monotonic() > deadline:
                with self.host.lock:
                    reached = self.amount(self.host.running(step.guest), self._own(step))
                raise ShortfallError(f"{step.describe()}: no answer in time", reached=reached)

    def amount(self, guest: SimulatedGuest, step: S) -> int:
        """What the guest has now of what the step moves; 0 where that means nothing."""
        return 0


class _VirtioMem(SimulatedHandler[ResizeVirtioMem]):
    step_type = ResizeVirtioMem
    event = EventKind.MEMORY

    def amount(self, guest: SimulatedGuest, step: ResizeVirtioMem) -> int:
        if guest.device(step.alias) is None:
            raise HypervisorError(f"{guest.spec.name}: no memory device {step.alias}")
        return guest.real.devices[step.alias]

    def bring(self, guest: SimulatedGuest, step: ResizeVirtioMem, *, lost: bool) -> None:
        self._request(guest, step, step.after)
        if lost:
            return
        reached = self.amount(guest, step)
        if abs(reached - step.after) > step.tolerance:
            guest.said.devices[step.alias] = reached
            raise ShortfallError(
                f"{step.describe()}: the guest stopped at {Bytes(reached)}", reached=reached
            )

    def differs(self, guest: SimulatedGuest, step: ResizeVirtioMem) -> str:
        found = self.amount(guest, step)
        return memory_difference(found, step.after, step.tolerance)

    def give_back(self, guest: SimulatedGuest, step: ResizeVirtioMem) -> int:
        self._request(guest, step, step.before)
        return max(0, self.amount(guest, step) - step.before)

    def _request(self, guest: SimulatedGuest, step: ResizeVirtioMem, target: int) -> None:
        current = self.amount(guest, step)
        device = guest.device(step.alias)
        if device is None or not 0 <= target <= device.size or target % device.block:
            raise HypervisorError(
                f"{guest.spec.name}: requested size {target} of {step.alias} is out of range or "
                "not a multiple of the block size"
            )
        guest.said.devices[step.alias] = target
        least = min(current, self.host.faults.sticks.get((step.guest, step.alias), 0))
        target = max(target, least)
        guest.real.devices[step.alias] = self.host.moved(step.guest, current, target, device.block)


class _Balloon(SimulatedHandler[SetBalloon]):
    step_type = SetBalloon
    event = EventKind.MEMORY

    def amount(self, guest: SimulatedGuest, step: SetBalloon) -> int:
        return guest.real.boot_memory

    def bring(self, guest: SimulatedGuest, step: SetBalloon, *, lost: bool) -> None:
        self._request(guest, step, step.after)
        if lost:
            return
        reached = guest.real.boot_memory
        if abs(reached - step.after) > step.tolerance:
            guest.said.boot_memory = reached
            raise ShortfallError(
                f"{step.describe()}: the guest stopped at {Bytes(reached)}", reached=reached
            )

    def differs(self, guest: SimulatedGuest, step: SetBalloon) -> str:
        return memory_difference(guest.real.boot_memory, step.after, step.tolerance)

    def give_back(self, guest: SimulatedGuest, step: SetBalloon) -> int:
        self._request(guest, step, step.before)
        return max(0, guest.real.boot_memory - step.before)

    def _request(self, guest: SimulatedGuest, step: SetBalloon, target: int) -> None:
        if not guest.spec.balloon:
            raise HypervisorError(f"{guest.spec.name}: has no balloon")
        if not 0 < target <= guest.spec.boot_memory:
            raise HypervisorError(f"{guest.spec.name}: cannot set memory higher than max memory")
        guest.said.boot_memory = target
        guest.real.boot_memory = self.host.moved(step.guest, guest.real.boot_memory, target, 4096)


class _VcpuCount(SimulatedHandler[SetVcpuCount]):
    step_type = SetVcpuCount
    event = EventKind.VCPUS

    def amount(self, guest: SimulatedGuest, step: SetVcpuCount) -> int:
        return guest.real.vcpus

    def bring(self, guest: SimulatedGuest, step: SetVcpuCount, *, lost: bool) -> None:
        if not 0 < step.after <= guest.spec.vcpus_max:
            raise HypervisorError(f"{guest.spec.name}: {step.after} vCPUs are out of range")
        if self._stuck(guest, step.after):
            raise ShortfallError(
                f"{step.describe()}: the guest does not let a vCPU go", reached=guest.real.vcpus
            )
        guest.plug(step.after, lost=lost)

    def differs(self, guest: SimulatedGuest, step: SetVcpuCount) -> str:
        found = guest.real.vcpus
        return "" if found == step.after else f"{step.after} vCPU threads expected, {found} found"

    def give_back(self, guest: SimulatedGuest, step: SetVcpuCount) -> int:
        if self._stuck(guest, step.before):
            return guest.real.vcpus - step.before
        guest.plug(step.before)
        return 0

    def _stuck(self, guest: SimulatedGuest, target: int) -> bool:
        return target < guest.real.vcpus and guest.spec.uuid in self.host.faults.keeps_vcpus


class _Setting(SimulatedHandler[S]):
    """A value that the host sets and no guest has a say in."""

    def put(self, hardware: Hardware, step: S, *, back: bool) -> None:
        """Set `after`, or `before` on the way back."""
        raise NotImplementedError

    def problem(self, hardware: Hardware, step: S) -> str:
        """How the value differs from `after`."""
        raise NotImplementedError

    def check(self, guest: SimulatedGuest, step: S) -> None:
        """Raise HypervisorError for what the host could not do."""

    def bring(self, guest: SimulatedGuest, step: S, *, lost: bool) -> None:
        self.check(guest, step)
        self.put(guest.said, step, back=False)
        if not lost:
            self.put(guest.real, step, back=False)

    def differs(self, guest: SimulatedGuest, step: S) -> str:
        return self.problem(guest.real, step)

    def give_back(self, guest: SimulatedGuest, step: S) -> int:
        self.put(guest.said, step, back=True)
        self.put(guest.real, step, back=True)
        return 0

    def any_or(self, cpus: CpuSet) -> CpuSet:
        """`before` is empty where nobody had pinned: all pCPUs."""
        return cpus or self.host.cpus


class _PinVcpu(_Setting[PinVcpu]):
    step_type = PinVcpu

    def check(self, guest: SimulatedGuest, step: PinVcpu) -> None:
        self.host.check_cpus(step.after)
        if not 0 <= step.vcpu < guest.spec.vcpus_max:
            raise HypervisorError(f"{guest.spec.name}: no vCPU {step.vcpu}")

    def put(self, hardware: Hardware, step: PinVcpu, *, back: bool) -> None:
        if step.vcpu in hardware.affinity:
            hardware.affinity[step.vcpu] = self.any_or(step.before if back else step.after)

    def problem(self, hardware: Hardware, step: PinVcpu) -> str:
        found = hardware.affinity.get(step.vcpu)
        return "" if found in (None, self.any_or(step.after)) else _difference(step.after, found)


class _PinEmulator(_Setting[PinEmulator]):
    step_type = PinEmulator

    def check(self, guest: SimulatedGuest, step: PinEmulator) -> None:
        self.host.check_cpus(step.after)

    def put(self, hardware: Hardware, step: PinEmulator, *, back: bool) -> None:
        hardware.emulator = self.any_or(step.before if back else step.after)

    def problem(self, hardware: Hardware, step: PinEmulator) -> str:
        wanted = self.any_or(step.after)
        return "" if hardware.emulator == wanted else _difference(wanted, hardware.emulator)


class _Quota(_Setting[SetQuota]):
    step_type = SetQuota

    def check(self, guest: SimulatedGuest, step: SetQuota) -> None:
        # The kernel's least quota is 1 ms: kernel/sched/core.c, min_cfs_quota_period.
        if 0 <= step.after < 10:
            raise HypervisorError(f"{guest.spec.name}: a quota of {step.after}m is too small")

    def put(self, hardware: Hardware, step: SetQuota, *, back: bool) -> None:
        hardware.quota_us = _quota_us(step.before if back else step.after)

    def problem(self, hardware: Hardware, step: SetQuota) -> str:
        wanted = _quota_us(step.after)
        return "" if hardware.quota_us == wanted else _difference(wanted, hardware.quota_us)


class _Shares(_Setting[SetShares]):
    step_type = SetShares

    def put(self, hardware: Hardware, step: SetShares, *, back: bool) -> None:
        hardware.shares = step.before if back else step.after

    def problem(self, hardware: Hardware, step: SetShares) -> str:
        found = DEFAULT_SHARES if hardware.shares is None else hardware.shares
        return "" if found == step.after else _difference(step.after, found)


class _Nodeset(_Setting[SetNodeset]):
    step_type = SetNodeset

    def check(self, guest: SimulatedGuest, step: SetNodeset) -> None:
        self.host.check_nodes(step.after)

    def put(self, hardware: Hardware, step: SetNodeset, *, back: bool) -> None:
        hardware.nodes = step.before if back else step.after

    def problem(self, hardware: Hardware, step: SetNodeset) -> str:
        return "" if hardware.nodes == step.after else _difference(step.after, hardware.nodes)


class _MarkPins(_Setting[MarkPins]):
    step_type = MarkPins
    event = EventKind.METADATA
    event_detail = MARK_NAMESPACE

    def put(self, hardware: Hardware, step: MarkPins, *, back: bool) -> None:
        hardware.mark = step.before if back else step.after

    def problem(self, hardware: Hardware, step: MarkPins) -> str:
        return "" if hardware.mark == step.after else _difference(step.after, hardware.mark)


class _Policy(SimulatedHandler[SetPolicy]):
    step_type = SetPolicy
    event = EventKind.METADATA

    def find(self, step: SetPolicy) -> SimulatedGuest:
        live = step.definition is Definition.LIVE
        return self.host.changeable(step.guest) if live else self.host.defined(step.guest)

    def bring(self, guest: SimulatedGuest, step: SetPolicy, *, lost: bool) -> None:
        self._put(guest, step.definition, step.after, lost=lost)

    def differs(self, guest: SimulatedGuest, step: SetPolicy) -> str:
        live = step.definition is Definition.LIVE
        found = guest.real.policy if live else write_policy(guest.spec.policy)
        return "" if found == step.after else _difference(step.after, found)

    def give_back(self, guest: SimulatedGuest, step: SetPolicy) -> int:
        self._put(guest, step.definition, step.before, lost=False)
        return 0

    def _put(self, guest: SimulatedGuest, definition: Definition, text: str, *, lost: bool) -> None:
        if definition is Definition.LIVE:
            guest.said.policy = text
            if not lost:
                guest.real.policy = text
        elif not lost:
            guest.spec = replace(guest.spec, policy=read_policy(text), policy_error="")


def simulated_handlers(host: SimulatedHost) -> tuple[StepHandler, ...]:
    """One handler for each step type."""
    return (
        _VirtioMem(host), _Balloon(host), _VcpuCount(host), _PinVcpu(host), _PinEmulator(host),
        _Quota(host), _Shares(host), _Nodeset(host), _MarkPins(host), _Policy(host),
    )  # fmt: skip


def _quota_us(millicpu: int) -> int:
    return -1 if millicpu < 0 else millicpu * PERIOD_US // 1000


def _difference(wanted: object, found: object) -> str:
    return f"{wanted} expected, {found} found"


def memory_difference(found: int, wanted: int, tolerance: int) -> str:
    """In words; empty where it is within the tolerance."""
    if abs(found - wanted) <= tolerance:
        return ""
    return _difference(Bytes(wanted), Bytes(found))
