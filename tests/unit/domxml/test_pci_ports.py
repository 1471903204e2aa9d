"""Root ports of a definition: what is free, and more of them without moving anything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtfabric.domxml.pciports import (
    Extension,
    add_ports,
    check_extension,
    free_ports,
    read_ports,
)
from virtfabric.model.errors import InvalidValueError, Reason, Refusal

ADDRESS = "<address type='pci' domain='0x0000' bus='0x{:02x}' slot='0x{:02x}' function='0x{:x}'{}/>"
QEMU = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"


def at(bus: int, slot: int, function: int = 0, *, shared: bool = False) -> str:
    return ADDRESS.format(bus, slot, function, " multifunction='on'" if shared else "")


def port(index: int, slot: int, function: int = 0, *, chassis: int | None = None) -> str:
    return (
        f"<controller type='pci' index='{index}' model='pcie-root-port'>"
        f"<target chassis='{chassis or index}' port='0x8'/>"
        f"{at(0, slot, function, shared=function == 0)}</controller>"
    )


def domain(*devices: str, machine: str = "pc-q35-7.2", root: str = "pcie-root") -> str:
    return (
        f"<domain type='qemu' {QEMU}><name>db</name>"
        f"<os><type machine='{machine}'>hvm</type></os>"
        "<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>"
        f"<controller type='pci' index='0' model='{root}'/>"
        f"<controller type='sata' index='0'>{at(0, 0x1F, 2)}</controller>"
        f"{''.join(devices)}</devices></domain>"
    )


NET = f"<interface type='network'><mac address='52:54:00:00:00:01'/>{at(1, 0)}</interface>"
HOSTDEV = (
    "<hostdev mode='subsystem' type='pci' managed='no'><source>"
    "<address domain='0x0000' bus='0x3b' slot='0x10' function='0x1'/></source>"
    f"{at(2, 0)}</hostdev>"
)


def extended(text: str, count: int) -> Extension:
    answer = add_ports(text, count)
    assert isinstance(answer, Extension), answer
    return answer


def places(text: str) -> dict[int, str | None]:
    return {p.index: p.address for p in read_ports(text)}


# -- what is free ------------------------------------------------------------------------------


def test_a_port_is_free_when_nothing_is_on_its_bus() -> None:
    text = domain(port(1, 2), port(2, 2, 1), port(3, 2, 2), NET, HOSTDEV)
    assert [(p.index, p.free, p.users) for p in read_ports(text)] == [
        (1, False, ("interface 52:54:00:00:00:01",)),
        (2, False, ("hostdev 0000:3b:10.1",)),
        (3, True, ()),
    ]
    assert free_ports(text) == 1


def test_the_hosts_address_of_a_hostdev_is_not_its_place_in_the_guest() -> None:
    on_host_bus_1 = HOSTDEV.replace("bus='0x3b'", "bus='0x01'")
    assert free_ports(domain(port(1, 2), port(2, 2, 1), on_host_bus_1)) == 1


def test_a_port_that_takes_nothing_live_is_not_free() -> None:
    fixed = port(1, 2).replace("<target ", "<target hotplug='off' ")
    assert free_ports(domain(fixed, port(2, 2, 1))) == 1


def test_the_port_below_a_switch_counts_and_the_one_that_holds_the_switch_does_not() -> None:
    upstream = f"<controller type='pci' index='2' model='pcie-switch-upstream-port'>{at(1, 0)}"
    downstream = f"<controller type='pci' index='3' model='pcie-switch-downstream-port'>{at(2, 0)}"
    end = "</controller>"
    ports = read_ports(domain(port(1, 2), upstream + end, downstream + end))
    assert [(p.index, p.free) for p in ports] == [(1, False), (3, True)]
    assert ports[0].users == ("controller pci pcie-switch-upstream-port",)


@pytest.mark.parametrize("argument", ["edu,bus=pci.1", '{"driver":"edu","bus":"pci.1"}'])
def test_what_the_command_line_plugs_into_a_port_uses_it(argument: str) -> None:
    arguments = f"<qemu:arg value='-device'/><qemu:arg value='{argument}'/>"
    text = domain(port(1, 2), port(10, 2, 1)).replace(
        "</domain>", f"<qemu:commandline>{arguments}</qemu:commandline></domain>"
    )
    assert [(p.index, p.free) for p in read_ports(text)] == [(1, False), (10, True)]


def test_a_pc_machine_has_no_port_at_all() -> None:
    assert read_ports(domain(NET, machine="pc-i440fx-7.2", root="pci-root")) == ()


# -- more of them ------------------------------------------------------------------------------


def test_new_ports_fill_the_slot_of_root_ports_first_and_then_the_next() -> None:
    text = domain(port(1, 2), port(2, 2, 1), NET)
    more = extended(text, 8)
    assert more.indexes == tuple(range(3, 11))
    assert list(places(more.xml).values())[2:] == [
        *(f"0000:00:02.{n}" for n in range(2, 8)), "0000:00:03.0", "0000:00:03.1",
    ]  # fmt: skip
    assert free_ports(more.xml) == free_ports(text) + 8


def test_slots_of_other_devices_and_single_ports_are_left_alone() -> None:
    video = f"<video>{at(0, 2)}</video>"
    single = port(1, 3).replace(" multifunction='on'", "")
    mixed = port(2, 4) + f"<sound model='ich9'>{at(0, 4, 1)}</sound>"
    assert places(extended(domain(video, single, mixed), 1).xml)[3] == "0000:00:05.0"


def test_a_chassis_is_never_given_twice() -> None:
    text = extended(domain(port(1, 2, chassis=2), port(5, 2, 1, chassis=3)), 3).xml
    numbers = [part.split("'")[1] for part in text.replace('"', "'").split("chassis=")[1:]]
    assert len(numbers) == len(set(numbers)) == 5


@settings(deadline=None)  # of wall-clock time: the machine may be busy
@given(present=st.integers(0, 16), count=st.integers(1, 60))
def test_nothing_that_is_there_changes(present: int, count: int) -> None:
    ports = [port(n + 1, 2 + n // 8, n % 8) for n in range(present)]
    text = domain(*ports, *([NET] if present else []))
    more = extended(text, count)
    assert check_extension(text, more.xml, more.indexes) == ""
    found = places(more.xml)
    assert len(set(found.values())) == len(found) == present + count
    assert places(text).items() <= found.items()


def test_more_than_fits_is_refused_with_what_would() -> None:
    answer = add_ports(domain(), 233)
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.NO_CAPACITY
    assert "232 would" in answer.detail  # slots 0x02 to 0x1e
    assert len(extended(domain(), 232).indexes) == 232


def test_a_pc_machine_is_refused_by_name() -> None:
    answer = add_ports(domain(machine="pc-i440fx-7.2", root="pci-root"), 1)
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.NO_MECHANISM
    assert "pc-i440fx-7.2" in answer.detail


def test_devices_of_the_command_line_could_shift_and_are_refused() -> None:
    text = domain().replace(
        "</domain>",
        "<qemu:commandline><qemu:arg value='-device'/><qemu:arg value='edu'/></qemu:commandline>"
        "</domain>",
    )
    answer = add_ports(text, 1)
    assert isinstance(answer, Refusal)
    assert "virsh edit" in answer.detail


@pytest.mark.parametrize("count", [0, -1])
def test_less_than_one_is_no_count(count: int) -> None:
    with pytest.raises(InvalidValueError, match="count"):
        add_ports(domain(), count)


# -- and read back -----------------------------------------------------------------------------


def test_a_device_that_moved_is_named() -> None:
    text = domain(port(1, 2), NET)
    more = extended(text, 1)
    moved = more.xml.replace('bus="0x01"', 'bus="0x02"').replace("bus='0x01'", "bus='0x02'")
    assert moved != more.xml
    wrong = check_extension(text, moved, more.indexes)
    assert wrong == "interface 52:54:00:00:00:01 has another address"


def test_a_port_that_libvirt_dropped_is_missed() -> None:
    text = domain(port(1, 2), NET)
    assert check_extension(text, text, (2,)) == "port 2 is not there"


def test_any_other_change_is_seen() -> None:
    text = domain(port(1, 2), NET)
    more = extended(text, 1)
    other = more.xml.replace("<name>db</name>", "<name>db2</name>")
    assert check_extension(text, other, more.indexes) == "more than the ports changed"


def test_indentation_is_no_change() -> None:
    text = domain(port(1, 2), NET)
    more = extended(text, 1)
    assert check_extension(text, more.xml.replace("><", ">\n  <"), more.indexes) == ""
