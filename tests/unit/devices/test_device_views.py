"""What `devices` shows: views of functions, and tables and trees made of those."""

from __future__ import annotations

import json
from dataclasses import replace

from virtfabric.cli.devicetables import device_table, device_tree_lines
from virtfabric.cli.screen import format_plain
from virtfabric.daemon.deviceviews import function_view
from virtfabric.model.device import (
    DeviceInventory,
    DevicePool,
    HostUse,
    Link,
    Match,
    PciAddress,
    PciFunction,
    Quarantine,
    UseKind,
)

PORT, NIC, VF, EDU = (
    PciAddress(a) for a in ("0000:00:10.0", "0000:01:00.0", "0000:01:10.0", "0000:00:02.0")
)
FUNCTIONS = {
    EDU: PciFunction(EDU, 0x1234, 0x11E8, class_code=0xFF0000, group=1),
    PORT: PciFunction(
        PORT, 0x1B36, 0x0C, class_code=0x060400, bridge=True, acs=True, group=2, node=1,
        driver="pcieport", link=Link(8000, 4, 16000, 4),
    ),
    NIC: PciFunction(
        NIC, 0x8086, 0x10C9, class_code=0x020000, driver="igb", node=1, group=3, parent=PORT,
        vfs=(VF,), vfs_max=7, uses=(HostUse(UseKind.NETWORK, "eth1 is up"),), interfaces=("eth1",),
    ),
    VF: PciFunction(
        VF, 0x8086, 0x10CA, class_code=0x020000, driver="igbvf", node=1, group=4, parent=PORT,
        pf=NIC, vf_index=0,
    ),
}  # fmt: skip
INVENTORY = DeviceInventory(FUNCTIONS, (DevicePool("net.vf", Match(pf=NIC)),))
LOST = Quarantine(VF, "reset failed", "power-cycle the host", since=1.0)


def views(
    holder: str | None = None, quarantine: Quarantine | None = None
) -> list[dict[str, object]]:
    shown = []
    for one in FUNCTIONS.values():
        mine = one.address == VF
        shown.append(
            function_view(
                INVENTORY, one, holder=holder if mine else None,
                quarantine=quarantine if mine else None,
            )
        )  # fmt: skip
    return shown


def test_a_view_is_json_of_everything() -> None:
    shown = function_view(INVENTORY, FUNCTIONS[VF], holder="db", quarantine=LOST)
    assert json.loads(json.dumps(shown)) == shown
    assert shown == {
        "address": VF, "ids": "8086:10ca", "class": "020000", "driver": "igbvf", "node": 1,
        "group": 4, "pf": NIC, "vfs": [], "vfs_max": 0,
        "link": {"speed": 0, "width": 0, "speed_max": 0, "width_max": 0}, "resets": [],
        "acs": None, "uses": [], "capability": "net.vf", "slice": None, "holder": "db",
        "quarantine": LOST.to_json(), "obstacles": [],
        "shares": [{"address": NIC, "what": "PF"}], "interfaces": [], "parent": PORT,
        "bridge": False,
    }  # fmt: skip
    used = function_view(INVENTORY, FUNCTIONS[NIC])
    assert used["uses"] == ["network: eth1 is up"]
    assert used["obstacles"] == ["the host uses it (network: eth1 is up)", "is a PF with VFs"]


def test_the_table_has_no_ports() -> None:
    text = format_plain(device_table(views()))
    assert PORT not in text
    cells = [line.split() for line in text.splitlines()[2:]]
    assert cells[0][:3] == [EDU, "1234:11e8", "class"]
    assert cells[1][:5] == [NIC, "8086:10c9", "Ethernet", "eth1", "igb"]
    assert "the host uses it (network: eth1 is up)" in text
    assert cells[2][-2:] == ["net.vf", "free"]


def test_the_tree() -> None:
    assert device_tree_lines(views()) == [
        "0000:00:02.0  class ff0000  1234:11e8  no driver  group 1  in no pool",
        "0000:00:10.0  port  1b36:000c  8 of 16 GT/s x4  ACS isolates  node 1  group 2",
        "├─ 0000:01:00.0  Ethernet  8086:10c9  eth1  igb  node 1  group 3  PF with 1 of 7 VFs  "
        "not assignable",
        "│       the host uses it (network: eth1 is up)",
        "│       is a PF with VFs",
        "└─ 0000:01:10.0  Ethernet  8086:10ca  igbvf  node 1  group 4  VF of 0000:01:00.0  "
        "[net.vf]  free",
    ]


def test_who_has_it_and_what_is_in_quarantine() -> None:
    held = device_tree_lines(views(holder="db"))[-1]
    assert held.endswith("[net.vf]  with db")
    lost = device_tree_lines(views(holder="db", quarantine=LOST))[-2:]
    assert lost[0].endswith("[net.vf]  quarantined")
    assert lost[1].strip() == "reset failed; power-cycle the host"
    table = format_plain(device_table(views(quarantine=LOST)))
    assert table.endswith("reset failed; power-cycle the host")
    assert "quarantined" in table


def test_a_function_whose_port_is_not_there_is_shown() -> None:
    lone = function_view(INVENTORY, replace(FUNCTIONS[VF], parent=PciAddress("0000:09:00.0")))
    assert device_tree_lines([lone])[0].startswith("0000:01:10.0")
    assert device_tree_lines([]) == []


def test_a_port_below_a_port() -> None:
    lower = PciFunction(PciAddress("0000:05:00.0"), class_code=0x060400, bridge=True, parent=PORT)
    end = PciFunction(PciAddress("0000:06:00.0"), class_code=0x010802, parent=lower.address)
    chain = [function_view(INVENTORY, one) for one in (FUNCTIONS[PORT], lower, end)]
    assert [line[:18] for line in device_tree_lines(chain)[:3]] == [
        "0000:00:10.0  port", "└─ 0000:05:00.0  p", "   └─ 0000:06:00.0",
    ]  # fmt: skip
