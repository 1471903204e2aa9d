"""What the step handlers of PCI functions share: they change the host, whatever the guest does."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Generic, TypeVar

from virtfabric.model.errors import DeviceGoneError, InvalidValueError
from virtfabric.model.step import Step

if TYPE_CHECKING:
    from virtfabric.ports import StepContext

S = TypeVar("S", bound=Step)


class PciHandler(Generic[S]):
    """Implements `ports.StepHandler`. A guest that has stopped changes nothing here.

    A function that has vanished counts as undone: nothing of it is left to restore.
    """

    kind: str
    step_type: type[S]

    def __init__(self) -> None:
        self.kind = self.step_type.kind

    def apply(self, step: Step, context: StepContext) -> None:
        """Bring about `step.after`."""
        own = self._own(step)
        self.bring_about(own, context)
        context.progress(1.0, own.describe())

    def verify(self, step: Step) -> None:
        """Check what the kernel shows."""
        self.check(self._own(step))

    def undo(self, step: Step) -> int:
        """Restore `step.before`; no guest has a say, so nothing is left over."""
        with suppress(DeviceGoneError):
            self.give_back(self._own(step))
        return 0

    def bring_about(self, step: S, context: StepContext) -> None:
        """Reach `step.after`.

        Raises:
            DeviceGoneError, DeviceError, StepCancelledError
        """
        raise NotImplementedError

    def check(self, step: S) -> None:
        """Raise VerificationError unless the kernel shows `step.after`."""
        raise NotImplementedError

    def give_back(self, step: S) -> None:
        """Restore `step.before`."""
        raise NotImplementedError

    def _own(self, step: Step) -> S:
        if not isinstance(step, self.step_type):
            raise InvalidValueError("step.kind", step.kind, f"is not for the {self.kind} handler")
        return step
