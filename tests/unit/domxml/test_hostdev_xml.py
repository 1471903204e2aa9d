"""Devices of a domain: what is attached, and where there is room for more."""

from __future__ import annotations

import pytest

from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.hostdev import format_function
from virtfabric.model.device import GuestDevice, PciAddress
from virtfabric.model.errors import InvalidValueError
from virtfabric.model.guest import MemoryMechanism

# as libvirt 11.3 shows a running guest: two functions attached, one port of three left
LIVE = """
<domain type='kvm' id='3'>
  <name>guest</name><uuid>00000000-0000-4000-8000-000000000001</uuid>
  <memory unit='KiB'>163840</memory><vcpu>1</vcpu>
  {backing}
  <devices>
    <controller type='pci' index='0' model='pcie-root'><alias name='pcie.0'/></controller>
    {ports}
    <interface type='hostdev' managed='yes'>
      <mac address='52:54:00:00:00:01'/>
      <driver name='vfio'/>
      <source><address type='pci' domain='0x0000' bus='0x01' slot='0x10' function='0x2'/></source>
      <alias name='hostdev0'/>
      <address type='pci' domain='0x0000' bus='0x02' slot='0x00' function='0x0'/>
    </interface>
    <hostdev mode='subsystem' type='pci' managed='no'>
      <driver name='vfio'/>
      <source><address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source>
      <alias name='ua-virtfabric-0000-03-00-0'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
    </hostdev>
    <hostdev mode='subsystem' type='usb'><source><vendor id='0x1'/></source></hostdev>
    <memballoon model='virtio'/>
  </devices>
</domain>
"""


def port(index: int, model: str = "pcie-root-port", extra: str = "") -> str:
    return (
        f"<controller type='pci' index='{index}' model='{model}'><target chassis='{index}'{extra}/>"
        f"<address type='pci' domain='0x0000' bus='0x00' slot='0x02' function='0x{index}'/>"
        "</controller>"
    )


def live(*ports: str, backing: str = "") -> str:
    return LIVE.format(ports="".join(ports), backing=backing)


def test_functions_of_a_running_guest():
    guest = parse_domain(live(port(1), port(2), port(3)), None)
    network, plain = sorted(guest.devices, key=lambda device: device.address)
    assert network == GuestDevice(
        PciAddress("0000:01:10.2"), "hostdev0", True, PciAddress("0000:02:00.0")
    )
    assert not network.ours
    assert plain == GuestDevice(
        PciAddress("0000:03:00.0"), "ua-virtfabric-0000-03-00-0", False, PciAddress("0000:01:00.0")
    )
    assert plain.ours
    assert guest.config_devices == ()
    assert guest.mechanism is MemoryMechanism.FIXED


def test_definition_is_kept_apart():
    config = (
        "<domain type='kvm'><uuid>00000000-0000-4000-8000-000000000001</uuid><vcpu>1</vcpu>"
        "<memory>1</memory><devices><hostdev mode='subsystem' type='pci' managed='yes'><source>"
        "<address domain='0' bus='3' slot='0' function='0'/></source></hostdev></devices></domain>"
    )
    guest = parse_domain(live(port(1)), config)
    assert guest.config_devices == (GuestDevice(PciAddress("0000:03:00.0"), managed=True),)
    assert len(guest.devices) == 2


@pytest.mark.parametrize(
    ("ports", "free"),
    [
        ((port(1), port(2)), 0),
        ((port(1), port(2), port(3), port(4)), 2),
        ((port(1), port(2), port(10)), 1),
        ((port(3, "pcie-switch-downstream-port"),), 1),
        ((port(3, "pcie-switch-upstream-port"),), 0),
        ((port(3, "pcie-to-pci-bridge"),), 0),
        ((port(3, extra=" hotplug='off'"),), 0),
        ((), 0),
    ],
)
def test_ports_with_nothing_behind_them(ports, free):
    assert parse_domain(live(*ports), None).free_ports == free


def test_locked_memory():
    assert not parse_domain(live(), None).locked_memory
    locked = live(backing="<memoryBacking><locked/></memoryBacking>")
    assert parse_domain(locked, None).locked_memory


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("bus='0x03'", "bus='x'", "hostdev.source.address.bus"),
        ("<address domain='0x0000' bus='0x03'", "<address domain='0x0000'", "address.bus"),
        ("slot='0x10' function='0x2'", "slot='0x40' function='0x2'", "hostdev.source.address"),
        ("<source><address domain='0x0000' bus='0x03' slot='0x00' function='0x0'/></source>", "",
         "hostdev.source.address"),
    ],
)  # fmt: skip
def test_nonsense_names_the_field(old, new, field):
    text = live(port(1))
    assert old in text
    with pytest.raises(InvalidValueError, match=field):
        parse_domain(text.replace(old, new, 1), None)


def test_what_is_written_reads_back():
    text = live().replace(
        "<memballoon", format_function(PciAddress("10000:0a:1f.7")) + "<memballoon"
    )
    devices = parse_domain(text, None).devices
    assert GuestDevice(PciAddress("10000:0a:1f.7"), "ua-virtfabric-10000-0a-1f-7") in devices
