"""What goes wrong on a simulated host: faults that wait for the step they are meant for."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtfabric.model.ids import GuestId
    from virtfabric.model.step import Step


class Phase(StrEnum):
    """Where in a step a fault strikes."""

    APPLY = "apply"
    """Before anything of the step has happened."""
    APPLIED = "applied"
    """After it has happened, before `apply` returns."""
    VERIFY = "verify"
    """Before the check."""
    VERIFIED = "verified"
    """After the check, before `verify` returns."""
    UNDO = "undo"
    """Before anything was undone."""
    UNDONE = "undone"
    """After it was undone, before `undo` returns."""


class Effect(StrEnum):
    """What the fault does."""

    FAIL = "fail"
    """libvirt fails the call (`verify`: the kernel shows something else)."""
    LOSE = "lose"
    """Phase APPLY: libvirt says yes, the kernel does not follow, so that `verify` finds it."""
    VANISH = "vanish"
    """The guest stops."""
    DISCONNECT = "disconnect"
    """The connection to libvirtd goes down and stays down until `reconnect`."""
    HOLD = "hold"
    """The step waits for `Fault.gate`, its deadline or the caller's cancellation."""
    CRASH = "crash"
    """`SimulatedCrash`: as if the agent had got SIGKILL here."""


class SimulatedCrash(BaseException):
    """The agent dies here. Not an `Exception`, so that no handler of errors survives it."""


@dataclass
class Fault:
    """One fault. `kind` and `guest` None match any.

    Attributes:
        skip: how many matching occasions pass unharmed first ("in step k").
        times: on how many occasions it strikes then, -1 for ever.
        gate: opens a HOLD.
        reached: set when the fault has struck, for a test to wait on.
    """

    effect: Effect
    phase: Phase = Phase.APPLY
    kind: str | None = None
    guest: GuestId | None = None
    skip: int = 0
    times: int = 1
    gate: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def matches(self, phase: Phase, step: Step) -> bool:
        """Whether this is an occasion for it."""
        return (
            self.phase is phase
            and self.kind in (None, step.kind)
            and self.guest in (None, step.guest)
            and self.times != 0
        )


class Faults:
    """All faults that wait, and the guests that do not cooperate.

    Attributes:
        gives: bytes that a guest will still give up when asked, all shrinking taken together.
        takes: bytes that a guest will still accept when it grows.
        sticks: bytes below which a virtio-mem device does not go, by guest and alias.
        keeps_vcpus: guests whose vCPUs do not leave.
        keeps_functions: guests that ignore the request to let a PCI function go.
        keeps_memory_devices: guests that ignore the request to let an empty memory device go.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self.gives: dict[GuestId, int] = {}
        self.takes: dict[GuestId, int] = {}
        self.sticks: dict[tuple[GuestId, str], int] = {}
        self.keeps_vcpus: set[GuestId] = set()
        self.keeps_functions: set[GuestId] = set()
        self.keeps_memory_devices: set[GuestId] = set()

    def add(self, fault: Fault) -> Fault:
        """Let a fault wait; returns it."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Take all faults away and open every gate; guests cooperate again."""
        with self._lock:
            for fault in self._faults:
                fault.gate.set()
            self._faults.clear()
            self.gives.clear()
            self.takes.clear()
            self.sticks.clear()
            self.keeps_vcpus.clear()
            self.keeps_functions.clear()
            self.keeps_memory_devices.clear()

    def strike(self, phase: Phase, step: Step) -> Fault | None:
        """The fault that strikes here, counted; None for a quiet life."""
        with self._lock:
            for fault in self._faults:
                if not fault.matches(phase, step):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.times -= fault.times > 0
                fault.reached.set()
                return fault
        return None
