"""One handler for each step type, for real."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.adapters.libvirt.cpu import (
    PinEmulatorHandler,
    PinVcpuHandler,
    QuotaHandler,
    SharesHandler,
    VcpuCountHandler,
)
from virtfabric.adapters.libvirt.dimm import DimmHandler
from virtfabric.adapters.libvirt.hostdev import FunctionHandler
from virtfabric.adapters.libvirt.mark import MarkHandler
from virtfabric.adapters.libvirt.memory import BalloonHandler, NodesetHandler, VirtioMemHandler
from virtfabric.adapters.libvirt.memorydevice import DetachMemoryHandler, MemoryDeviceHandler
from virtfabric.adapters.libvirt.policywriter import PolicyHandler

if TYPE_CHECKING:
    from virtfabric.adapters.libvirt.handler import Surroundings
    from virtfabric.ports import StepHandler


def libvirt_handlers(host: Surroundings) -> tuple[StepHandler, ...]:
    """All of them, for a registry."""
    return (
        VirtioMemHandler(host), BalloonHandler(host), VcpuCountHandler(host),
        PinVcpuHandler(host), PinEmulatorHandler(host), QuotaHandler(host), SharesHandler(host),
        NodesetHandler(host), MarkHandler(host), PolicyHandler(host),
        FunctionHandler(host), MemoryDeviceHandler(host), DetachMemoryHandler(host),
        DimmHandler(host),
    )  # fmt: skip
