"""What all step handlers of libvirt share: whom they ask, and how an undo ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import libvirt

from virtfabric.model.errors import (
    GuestGoneError,
    HypervisorError,
    HypervisorGoneError,
    InvalidValueError,
)
from virtfabric.model.step import Step

if TYPE_CHECKING:
    from virtfabric.adapters.cgroups import Cgroups
    from virtfabric.adapters.libvirt.connection import LibvirtConnection
    from virtfabric.adapters.libvirt.memlock import LockedMemory
    from virtfabric.adapters.libvirt.processes import QemuProcesses
    from virtfabric.adapters.libvirt.waiting import Pulse
    from virtfabric.adapters.pci.functionfiles import FunctionFiles
    from virtfabric.adapters.pci.holders import VfioHolders
    from virtfabric.adapters.sysfs import Sysfs
    from virtfabric.ports import StepContext

S = TypeVar("S", bound=Step)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The host around the handlers."""

    connection: LibvirtConnection
    processes: QemuProcesses
    cgroups: Cgroups
    sysfs: Sysfs
    pulse: Pulse
    functions: FunctionFiles
    holders: VfioHolders
    locked_memory: LockedMemory
    proc: Path = Path("/proc")


class LibvirtHandler(Generic[S]):
    """Implements `ports.StepHandler`; a subclass says how to bring a value about and check it."""

    kind: str
    step_type: type[S]

    def __init__(self, host: Surroundings) -> None:
        """A handler works on whatever guest its step names."""
        self.host = host
        self.kind = self.step_type.kind

    def apply(self, step: Step, context: StepContext) -> None:
        """Bring about `step.after`."""
        own = self._own(step)
        self.bring_about(own, context)
        context.progress(1.0, own.describe())

    def verify(self, step: Step) -> None:
        """Check against kernel or live state."""
        self.check(self._own(step))

    def undo(self, step: Step) -> int:
        """Restore `step.before`; a vanished guest counts as undone."""
        try:
            return self.give_back(self._own(step))
        except GuestGoneError:
            return 0

    def bring_about(self, step: S, context: StepContext) -> None:
        """Reach `step.after`, waiting for the guest where it has a say."""
        raise NotImplementedError

    def check(self, step: S) -> None:
        """Raise VerificationError unless the kernel (or the guest) shows `step.after`."""
        raise NotImplementedError

    def give_back(self, step: S) -> int:
        """Restore `step.before`; returns what the guest keeps."""
        raise NotImplementedError

    def find_pid(self, step: Step) -> int:
        """QEMU's process.

        Raises:
            GuestGoneError: there is none.
        """
        with self.host.connection.domain(step.guest) as dom:
            name = dom.name()
        pid = self.host.processes.find_pid(step.guest, name)
        if pid is None:
            raise GuestGoneError(f"{name}: no QEMU process")
        return pid

    def read_threads(self, step: Step) -> dict[int, int]:
        """Thread id by vCPU number.

        Raises:
            GuestGoneError: QEMU is gone.
        """
        threads = self.host.processes.read_vcpu_threads(self.find_pid(step))
        if not threads:
            raise GuestGoneError(f"{step.name or step.guest}: QEMU has no vCPU thread any more")
        return threads

    def _own(self, step: Step) -> S:
        if not isinstance(step, self.step_type):
            raise InvalidValueError("step.kind", step.kind, f"is not for the {self.kind} handler")
        return step


def has_code(error: HypervisorError, code: int) -> bool:
    """Whether libvirt's own error behind this one has this code; never for a guest that is gone."""
    cause = error.__cause__
    return (
        not isinstance(error, GuestGoneError | HypervisorGoneError)
        and isinstance(cause, libvirt.libvirtError)
        and cause.get_error_code() == code
    )


class LibvirtSetting(LibvirtHandler[S]):
    """A value that the host sets at once and no guest has a say in: undo is the inverse step."""

    def bring_about(self, step: S, context: StepContext) -> None:
        """Set `after`."""
        self._put_when_found(step)

    def give_back(self, step: S) -> int:
        """Set `before`; nothing is left over."""
        self._put_when_found(step.inverse())
        return 0

    def _put_when_found(self, step: S) -> None:
        """Set it, again while a libvirtd that has just started may not have found the guest yet."""
        error = self.host.pulse.wait_for(
            lambda: self._attempt(step),
            lambda error: error is None,
            until=self.host.connection.fresh_until,
        )
        if error is not None:
            raise error

    def _attempt(self, step: S) -> HypervisorError | None:
        try:
            self.put(step)
        except HypervisorError as error:
            if not has_code(error, libvirt.VIR_ERR_OPERATION_INVALID):
                raise
            return error
        return None

    def put(self, step: S) -> None:
        """Set `step.after`.

        Raises:
            GuestGoneError, HypervisorError
        """
        raise NotImplementedError
