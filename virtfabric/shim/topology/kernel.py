"""What a topology asks of the host's own kernel, as arguments on its command line.

Here is what belongs to the host's shape and no QEMU that we use can make: `disable-acs` of
`pcie-root-port` is gone in QEMU 11.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.shim.topology.seats import ROOT_BUS, choose_seats

if TYPE_CHECKING:
    from virtfabric.shim.topology.model import Topology


def kernel_arguments(topology: Topology) -> tuple[str, ...]:
    """The arguments that the kernel of any host of this topology needs; often none.

    A port without ACS is one whose redirection Linux leaves off: it then takes the port for no
    barrier, and puts the port and all behind it into one IOMMU group
    (Documentation/admin-guide/kernel-parameters.txt, `pci=disable_acs_redir=`).
    """
    buses = {ROOT_BUS: 0} | {bridge.id: bridge.bus for bridge in topology.bridges}
    seats = choose_seats(topology)
    open_seats = (seats[port.id] for port in topology.ports if not port.acs)
    ports = ";".join(f"{buses[s.bus]:02x}:{s.slot:02x}.{s.function}" for s in open_seats)
    return (f"pci=disable_acs_redir={ports}",) if ports else ()
