"""Definitions of simulated guests as XML: `ports.DefinitionEditor`.

A simulated guest has no XML of its own; it is given a q35 machine with a few root ports here. The
live one is what was defined when the process was first looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from virtfabric.model.errors import StaleDefinitionError
from virtfabric.model.guest import RunState
from virtfabric.ports import Definitions, EventKind

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.guest import SimulatedGuest
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.model.ids import GuestId

_PORTS: Final = 2
_MACHINE: Final = """<domain type='kvm'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <devices>
    <controller type='pci' index='0' model='pcie-root'/>
{ports}  </devices>
</domain>
"""
_PORT: Final = """    <controller type='pci' index='{index}' model='pcie-root-port'>
      <target chassis='{index}'/>
      <address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='{function}'{more}/>
    </controller>
"""


class SimulatedDefinitions:
    """Implements `ports.DefinitionEditor`.

    Attributes:
        mangle: what the simulated libvirt makes of a definition that it is given; as it is, unless
            a test sets something else.
    """

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host
        self._persistent: dict[GuestId, str] = {}
        self._live: dict[tuple[GuestId, int | None], str] = {}
        self.mangle = str

    def read_definitions(self, guest: GuestId) -> Definitions:
        """Both."""
        with self._host.lock:
            found = self._host.defined(guest)
            persistent = self._persistent.setdefault(guest, format_machine(found))
            live = None
            if found.state is not RunState.SHUTOFF:
                live = self._live.setdefault((guest, found.pid), persistent)
            return Definitions(live, persistent if found.spec.persistent else None)

    def replace_definition(self, guest: GuestId, before: str, after: str) -> None:
        """Make `after` the persistent definition of a guest that has `before`."""
        with self._host.lock:
            if self.read_definitions(guest).persistent != before:
                name = self._host.defined(guest).spec.name
                raise StaleDefinitionError(
                    f"the persistent definition of {name} changed meanwhile", advice="ask again"
                )
            self._persistent[guest] = self.mangle(after)
            self._host.tell(EventKind.DEFINED, guest)


def format_machine(guest: SimulatedGuest) -> str:
    """A q35 machine with two free root ports."""
    ports = (
        _PORT.format(index=n + 1, function=f"0x{n}", more="" if n else " multifunction='on'")
        for n in range(_PORTS)
    )
    return _MACHINE.format(name=guest.spec.name, uuid=guest.spec.uuid, ports="".join(ports))
