"""What counts as the emulator's failure, from what a look into a lab prints."""

from __future__ import annotations

import pytest

from virtfabric.shim.lab.health import find_faults, read_faults
from virtfabric.shim.lab.place import LabError

SOUND = """\
cpu 0
cpu 1
answers 1
answers 0
vcpu web CPU#0 RIP=ffffffff81d0356f RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
vcpu web CPU#0 RIP=ffffffff81d0356f RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
vcpu web CPU#0 RIP=ffffffff81d0356f RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
vcpu web CPU#0 RIP=ffffffff81d0356f RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
"""


def vcpu(*places: int, flags: int = 0x46, halted: int = 0) -> str:
    rest = "[---Z-P-] CPL=0 II=0 A20=1 SMM=0"
    line = "vcpu web CPU#2 RIP={:016x} RFL={:08x} {} HLT={}\n"
    return "".join(line.format(place, flags, rest, halted) for place in places)


def test_a_sound_lab():
    assert read_faults(SOUND) == []
    assert read_faults("") == read_faults("\n \n") == []


def test_a_processor_that_runs_nothing():
    assert read_faults("cpu 0\ncpu 10\ncpu 2\nanswers 0\n") == [
        "processor 2 of the lab runs nothing any more (60 s)",
        "processor 10 of the lab runs nothing any more (60 s)",
    ]


def test_a_vcpu_that_spins_without_interrupts():
    (fault,) = read_faults(SOUND + vcpu(0x1000, 0x1010, 0x1000, 0x1004))
    assert fault == "vCPU 2 of guest web spins at 0x1000 and takes no interrupts"


@pytest.mark.parametrize(
    "busy",
    [
        vcpu(0x1000, 0x1010, 0x1000, 0x1004, flags=0x246),
        vcpu(0x1000, 0x1010, 0x1000, 0x1004, halted=1),
        vcpu(0x1000, 0x1010, 0x9000, 0x1004),
        vcpu(0x1000, 0x1010, 0x1004),
        "vcpu web CPU#2 RIP=\n" * 4,
        "vcpu web\n",
    ],
    ids=["interrupts on", "halted", "elsewhere", "too few looks", "garbled", "cut off"],
)
def test_a_vcpu_that_only_works(busy):
    assert read_faults(SOUND + busy) == []


def test_guests_and_kernels_that_fell_over():
    text = (
        "ended db\nstalled - [ 12.3] rcu: INFO: detected stalls\nstalled db watchdog: soft lockup\n"
    )
    assert read_faults(text) == [
        "guest db ended by itself: if nobody told it to, it fell over (libvirt: shutting down, "
        "reason=shutdown)",
        "the lab's kernel says: [ 12.3] rcu: INFO: detected stalls",
        "guest db says: watchdog: soft lockup",
    ]


def test_a_lab_that_does_not_answer():
    class Silent:
        def run(self, command, *, timeout_s):
            raise LabError(f"did not end within {timeout_s:.0f} s")

    assert find_faults(Silent()) == ["the lab does not answer: did not end within 200 s"]
