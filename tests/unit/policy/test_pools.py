"""Which functions a pool has, what keeps one from guests, and who else feels it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtfabric.model.device import (
    DeviceInventory,
    DevicePool,
    HostUse,
    Match,
    PciAddress,
    PciFunction,
    UseKind,
)
from virtfabric.policy.pools import blast_radius, members, obstacles, pool_of

PORT, OTHER_PORT, ROOT = (PciAddress(f"0000:00:{n}.0") for n in ("10", "11", "01"))
PF, VF0, VF1 = (PciAddress(f"0000:01:{n}.0") for n in ("00", "10", "11"))
DISK, PLAIN = PciAddress("0000:02:00.0"), PciAddress("0000:00:02.0")
UP = HostUse(UseKind.NETWORK, "eth0 is up")
ROOTED = HostUse(UseKind.MOUNTED, "nvme0n1 on /")


def port(address: PciAddress, parent: PciAddress | None = None) -> PciFunction:
    behind = HostUse(UseKind.BRIDGE, "a function directly behind it")
    return PciFunction(
        address, class_code=0x060400, bridge=True, parent=parent, driver="pcieport", group=0,
        uses=(behind,),
    )  # fmt: skip


def vf(address: PciAddress, index: int, **other: object) -> PciFunction:
    values = {"driver": "igbvf", "group": 20 + index, "parent": PORT} | other
    return PciFunction(
        address, 0x8086, 0x10CA, class_code=0x020000, pf=PF, vf_index=index, **values
    )  # type: ignore[arg-type]


def pf(**other: object) -> PciFunction:
    values = {"driver": "igb", "group": 10, "parent": PORT, "vfs": (VF0, VF1)} | other
    return PciFunction(PF, 0x8086, 0x10C9, class_code=0x020000, vfs_max=7, **values)  # type: ignore[arg-type]


def disk(**other: object) -> PciFunction:
    values = {"driver": "nvme", "group": 30, "parent": OTHER_PORT} | other
    return PciFunction(DISK, 0x1B36, 0x10, class_code=0x010802, **values)  # type: ignore[arg-type]


def plain(**other: object) -> PciFunction:
    values = {"group": 40, "class_code": 0xFF0000} | other
    return PciFunction(PLAIN, 0x1234, 0x11E8, **values)  # type: ignore[arg-type]


def inventory(*functions: PciFunction, pools: tuple[DevicePool, ...] = ()) -> DeviceInventory:
    """A host with a switch: both ports are below one root port."""
    usual = [port(ROOT), port(PORT, ROOT), port(OTHER_PORT, ROOT), pf(), vf(VF1, 1), vf(VF0, 0)]
    usual += [disk(), plain()]
    merged = {one.address: one for one in [*usual, *functions]}
    return DeviceInventory(merged, pools)


def pool(capability: str = "net.vf", **match: object) -> DevicePool:
    return DevicePool(capability, Match(**match))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("match", "found"),
    [
        ({"addresses": frozenset({DISK, VF1})}, [VF1, DISK]),
        ({"ids": frozenset({"8086:10ca"})}, [VF0, VF1]),
        ({"class_prefix": "0200"}, [PF, VF0, VF1]),
        ({"class_prefix": "01"}, [DISK]),
        ({"pf": PF}, [VF0, VF1]),
        ({"pf": DISK}, []),
        ({"class_prefix": "0200", "vfs": True}, [VF0, VF1]),
        ({"class_prefix": "0200", "vfs": False}, [PF]),
        ({"driver": "nvme"}, [DISK]),
        ({"ids": frozenset({"8086:10ca"}), "driver": "igb"}, []),
        ({}, [PLAIN, PF, VF0, VF1, DISK]),  # never a port
        ({"addresses": frozenset({PORT})}, []),
    ],
)
def test_members(match: dict[str, object], found: list[PciAddress]) -> None:
    host = inventory(pools=(pool(**match),))
    assert [one.address for one in members(host, "net.vf")] == found
    assert members(host, "net") == ()


def test_the_first_pool_that_matches_owns() -> None:
    first, second = pool("fast", addresses=frozenset({VF1})), pool("net.vf", pf=PF)
    host = inventory(pools=(first, second))
    assert [one.address for one in members(host, "fast")] == [VF1]
    assert [one.address for one in members(host, "net.vf")] == [VF0]
    assert pool_of(host, VF1) == first
    assert pool_of(host, DISK) is None
    assert pool_of(host, PciAddress("0000:7f:00.0")) is None


def test_two_pools_of_one_capability() -> None:
    pools = (pool(addresses=frozenset({VF1})), pool(addresses=frozenset({VF0})))
    assert [one.address for one in members(inventory(pools=pools), "net.vf")] == [VF0, VF1]


@pytest.mark.parametrize("driver", ["vfio-pci", None])
def test_a_function_that_a_guest_has_stays_in_its_pool(driver: str | None) -> None:
    """The driver that it will have again is not bound meanwhile."""
    host = inventory(vf(VF0, 0, driver=driver), pools=(pool(pf=PF, driver="igbvf"),))
    assert [one.address for one in members(host, "net.vf")] == [VF0, VF1]


def test_a_driver_alone_does_not_take_in_what_others_bound_to_vfio() -> None:
    host = inventory(disk(driver="vfio-pci"), pools=(pool(driver="igbvf", vfs=True),))
    assert [one.address for one in members(host, "net.vf")] == [VF0, VF1]


def test_what_can_be_assigned() -> None:
    host = inventory()
    for address in (VF0, VF1, DISK, PLAIN):
        assert obstacles(host, address) == ()


def test_what_the_host_uses() -> None:
    host = inventory(disk(uses=(ROOTED, UP)))
    assert obstacles(host, DISK) == (
        "the host uses it (mounted: nvme0n1 on /)",
        "the host uses it (network: eth0 is up)",
    )


def test_what_cannot_be_assigned_at_all() -> None:
    host = inventory(disk(group=None), plain(class_code=0x060100))
    assert obstacles(host, PORT) == ("is a bridge or port",)
    assert obstacles(host, PLAIN) == ("is a bridge or port",)
    assert obstacles(host, PciAddress("0000:7f:00.0")) == ("does not exist on this host",)
    assert obstacles(host, DISK) == ("has no IOMMU group (is the IOMMU switched on?)",)


@pytest.mark.parametrize(
    ("vfs", "told"),
    [
        ((vf(VF0, 0), vf(VF1, 1)), ("is a PF with VFs",)),
        ((vf(VF0, 0, driver="vfio-pci"), vf(VF1, 1)), (f"its VFs are in use: {VF0}",)),
        ((vf(VF0, 0), vf(VF1, 1, uses=(UP,))), (f"its VFs are in use: {VF1}",)),
    ],
)
def test_a_pf_with_vfs(vfs: tuple[PciFunction, ...], told: tuple[str, ...]) -> None:
    assert obstacles(inventory(*vfs), PF) == told


def test_a_pf_in_use_does_not_keep_its_vfs() -> None:
    assert obstacles(inventory(pf(uses=(UP,))), VF0) == ()


def test_a_group_shared_with_what_the_host_uses() -> None:
    host = inventory(disk(group=40, uses=(ROOTED,)))
    assert obstacles(host, PLAIN) == (
        f"its IOMMU group 40 has {DISK}, which the host uses (mounted: nvme0n1 on /)",
    )


@pytest.mark.parametrize(
    ("driver", "pools", "free"),
    [
        ("nvme", (), False),
        ("nvme", (pool("storage.nvme", class_prefix="0108"),), True),
        ("vfio-pci", (), True),
        ("pci-stub", (), True),
        (None, (), True),
    ],
)
def test_a_group_shared_with_another_function(
    driver: str | None, pools: tuple[DevicePool, ...], free: bool
) -> None:
    host = inventory(disk(group=40, driver=driver), pools=pools)
    told = f"its IOMMU group 40 has {DISK}, which nvme drives and no pool names"
    assert obstacles(host, PLAIN) == (() if free else (told,))


def test_a_group_shared_with_a_port() -> None:
    assert obstacles(inventory(plain(group=0)), PLAIN) == ()


def test_blast_radius() -> None:
    host = inventory(plain(group=20))
    assert [(one.address, word) for one, word in blast_radius(host, VF0)] == [
        (PLAIN, "group"), (PF, "PF"), (VF1, "PF"), (DISK, "link"),
    ]  # fmt: skip
    assert [(one.address, word) for one, word in blast_radius(host, DISK)] == [
        (PF, "link"), (VF0, "link"), (VF1, "link"),
    ]  # fmt: skip
    assert [(one.address, word) for one, word in blast_radius(host, PLAIN)] == [(VF0, "group")]
    assert blast_radius(host, PciAddress("0000:7f:00.0")) == ()


def test_blast_radius_of_one_port() -> None:
    second = PciFunction(PciAddress("0000:02:00.1"), parent=OTHER_PORT, group=31)
    assert (second, "port") in blast_radius(inventory(second), DISK)


def test_functions_without_a_group_do_not_share_it() -> None:
    host = inventory(plain(group=None), disk(group=None, parent=None))
    assert blast_radius(host, PLAIN) == ()


ADDRESSES = st.sampled_from([PORT, OTHER_PORT, ROOT, PF, VF0, VF1, DISK, PLAIN])
FUNCTIONS = st.builds(
    PciFunction, address=ADDRESSES, group=st.none() | st.integers(0, 3),
    parent=st.none() | ADDRESSES.filter(lambda a: a in (PORT, OTHER_PORT)), bridge=st.booleans(),
    pf=st.none() | ADDRESSES, driver=st.sampled_from([None, "vfio-pci", "igb"]),
    uses=st.lists(st.just(UP), max_size=1).map(tuple),
)  # fmt: skip
MATCHES = st.builds(
    Match, addresses=st.frozensets(ADDRESSES), vfs=st.none() | st.booleans(),
    driver=st.sampled_from(["", "igb"]), pf=st.none() | ADDRESSES,
)  # fmt: skip


@given(st.lists(FUNCTIONS), st.lists(MATCHES, max_size=4))
def test_whatever_the_host_is(functions: list[PciFunction], matches: list[Match]) -> None:
    """Each function is in one pool at most; nobody is harmed twice; what is used is not free."""
    tops = [one for one in functions if one.address not in (PORT, OTHER_PORT)]
    pools = tuple(DevicePool(f"c{n}", match) for n, match in enumerate(matches))
    host = DeviceInventory({one.address: one for one in tops}, pools)
    owned = [one.address for p in pools for one in members(host, p.capability)]
    assert len(owned) == len(set(owned))
    for one in host.functions.values():
        harmed = [other.address for other, _ in blast_radius(host, one.address)]
        assert len(harmed) == len(set(harmed))
        assert one.address not in harmed
        group = [o for o in host.functions.values() if o.group == one.group and not o.bridge]
        if not obstacles(host, one.address):
            assert one.group is not None
            assert not any(other.uses for other in group)
