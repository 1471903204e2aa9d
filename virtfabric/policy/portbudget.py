"""Whether a guest has a port for each PCIe function that its policy asks for.

No port can be added to a running guest, so what lacks at its start lacks until it boots anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from virtfabric.model.policy import GuestPolicy


def missing_ports(policy: GuestPolicy, free: int, *, plugged: int = 0) -> int:
    """How many more ports it takes.

    Args:
        policy: of the guest.
        free: ports of the definition in question with nothing behind them.
        plugged: functions that the policy has brought already, each behind a port of its own.
    """
    wanted = sum(device.count for device in policy.devices)
    return max(0, wanted - plugged - free)


def describe_shortage(name: str, missing: int) -> str:
    """One sentence with the remedy."""
    ports = "port" if missing == 1 else "ports"
    return (
        f"{name} lacks {missing} PCIe root {ports} for the functions that its policy asks for: "
        f"run `virtfabric ports add {name} --count {missing}` and start it anew"
    )
