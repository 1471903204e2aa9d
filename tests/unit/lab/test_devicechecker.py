"""The judge of the passthrough demo: each verdict is good where it should be, and can be bad."""

from __future__ import annotations

from dataclasses import replace

import pytest

from demo import devicechecker as judge
from demo import devicesight
from demo.devicechecker import Disk, Function, GuestSight, Nic, Sight

VF, OTHER = "0000:01:10.0", "0000:01:10.2"
POOL = (VF, OTHER)
FREE = Function(driver="", override="", group="40", node=0)
BOUND = Function(driver="vfio-pci", override="vfio-pci", group="40", node=0)
OTHER_FREE = Function(driver="", override="", group="41", node=0)
NOTHING = GuestSight(pid=7, ready=True, hostdevs=(), groups=(), nics=(), disks=())
HOLDS = replace(
    NOTHING, hostdevs=(VF,), groups=("40",), nics=(Nic("eth0", "02:00:00:00:00:01", answers=True),)
)
BEFORE = Sight({VF: FREE, OTHER: OTHER_FREE}, {"db": NOTHING, "web": replace(NOTHING, pid=8)})
AFTER = Sight({VF: BOUND, OTHER: OTHER_FREE}, {"db": HOLDS, "web": replace(NOTHING, pid=8)})


def holds(seen: Sight, count: int = 1) -> list[bool]:
    return [ok for ok, _ in judge.expect_holds(seen, "db", POOL, count)]


def with_guest(seen: Sight, name: str, guest: GuestSight) -> Sight:
    return replace(seen, guests=seen.guests | {name: guest})


def test_a_function_that_arrived() -> None:
    assert holds(AFTER) == [True, True]
    assert holds(BEFORE, 0) == [True, True]


def test_an_executor_that_does_nothing() -> None:
    assert holds(BEFORE) == [False, True]
    assert not judge.expect_nics(BEFORE, "db", 1)[0]
    assert not judge.expect_disks(BEFORE, "db", 1)[0]


@pytest.mark.parametrize(
    "seen",
    [
        replace(AFTER, functions=AFTER.functions | {VF: replace(BOUND, driver="igbvf")}),
        with_guest(AFTER, "db", replace(HOLDS, groups=())),
        with_guest(AFTER, "db", replace(HOLDS, groups=("40", "41"))),
        with_guest(AFTER, "web", replace(NOTHING, groups=("40",))),
    ],
    ids=["another driver", "not open", "one more open", "open in two guests"],
)
def test_what_the_kernel_does_not_confirm(seen: Sight) -> None:
    assert holds(seen) == [True, False]


def test_a_nic_has_to_answer() -> None:
    assert judge.expect_nics(AFTER, "db", 1)[0]
    silent = with_guest(
        AFTER, "db", replace(HOLDS, nics=(Nic("eth0", "02:00:00:00:00:01", False),))
    )
    assert not judge.expect_nics(silent, "db", 1)[0]
    assert not judge.expect_nics(AFTER, "db", 0)[0]


def test_a_disk_has_to_read_back() -> None:
    good, bad = (
        with_guest(AFTER, "db", replace(HOLDS, disks=(Disk("nvme0n1", reads_back=back),)))
        for back in (True, False)
    )
    assert judge.expect_disks(good, "db", 1)[0]
    assert not judge.expect_disks(bad, "db", 1)[0]


def test_what_changed() -> None:
    assert judge.expect_unchanged(AFTER, AFTER)[0]
    assert not judge.expect_unchanged(AFTER, BEFORE)[0]
    assert judge.expect_same_processes(AFTER, BEFORE)[0]
    again = with_guest(AFTER, "db", replace(HOLDS, pid=9))
    assert not judge.expect_same_processes(again, BEFORE)[0]


def test_what_came_back() -> None:
    drivers = dict.fromkeys(POOL, "")
    assert judge.expect_free(BEFORE, POOL, drivers)[0]
    assert not judge.expect_free(AFTER, POOL, drivers)[0]
    left = replace(BEFORE, functions=BEFORE.functions | {VF: replace(FREE, override="vfio-pci")})
    assert not judge.expect_free(left, POOL, drivers)[0]
    gone = replace(BEFORE, functions=BEFORE.functions | {VF: None})
    assert not judge.expect_free(gone, POOL, drivers)[0]
    assert not judge.expect_host_as_found(gone, BEFORE)[0]


def test_the_address_that_an_interface_gives_itself() -> None:
    # the example of RFC 4291, appendix A: the universal/local bit is inverted, FFFE put in between
    assert devicesight.format_link_local("34:56:78:9a:bc:de") == "fe80::3656:78ff:fe9a:bcde"
