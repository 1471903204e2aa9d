"""The demo's story in numbers: guests, the corner of the machine they share, what is right when.

Every expectation is worked out here, by hand, from the policies below. None of it comes from the
agent. CPU is in milli-CPU, memory in MiB.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from demo import checker
from demo.host import Guest

if TYPE_CHECKING:
    from demo.checker import Finding, Observation

CORNER = frozenset({0, 1})
OVERHEAD = 16
RESERVE = 16
FREE_CPU = 100
FREE_MEMORY = 32


@dataclass(frozen=True, slots=True)
class Share:
    """What one guest should have. `cpu` None: no cap, it has its pCPUs to itself."""

    cpu: int | None
    memory: int
    vcpus: int = 1
    cpus: frozenset[int] = CORNER


GUESTS = (
    Guest(
        name="batch", priority=10, cpu="200m:600m", max_vcpus=1, virtio_mem=384, plugged=384
    ),
    Guest(name="web", priority=50, cpu="200m:300m", virtio_mem=128, plugged=64),
    Guest(name="database", priority=90, cpu="500m:2", virtio_mem=512, plugged=64),
)  # fmt: skip

START = {
    "batch": Share(600, 544),
    "web": Share(300, 224),
    "database": Share(1000, 224),
}
MEMORY = sum(s.memory + OVERHEAD for s in START.values()) + FREE_MEMORY + RESERVE

# Act 2: 100m and 32 MiB are free, batch pays the rest. web could pay, too (100m and 64 MiB), but
# batch has enough and a lower priority.
ASKED_CPU, ASKED_MEMORY = 400, 128
AFTER_ALLOCATE = {
    "batch": Share(600 - (ASKED_CPU - FREE_CPU), 544 - (ASKED_MEMORY - FREE_MEMORY)),
    "web": START["web"],
    "database": Share(1000 + ASKED_CPU, 224 + ASKED_MEMORY, vcpus=2),
}
# Act 3: batch and web have 100m each above their reservations.
TOO_MUCH_CPU = 500
# Act 4: batch could pay this (down to 160 MiB of boot memory), but the agent dies on the way.
CRASH_CPU, CRASH_MEMORY = 100, 192


def released_shares(*, unplugs: bool) -> dict[str, Share]:
    """Act 5: where vCPUs do not leave, the second one stays plugged, under the old cap.

    Taking one away needs KVM: QEMU 7.2 under TCG loses count of its vCPUs then.
    """
    return START | {"database": replace(START["database"], vcpus=1 if unplugs else 2)}


def expect_shares(
    seen: dict[str, Observation],
    wanted: dict[str, Share],
    first: dict[str, Observation],
) -> list[Finding]:
    """Every guest has its share, by cgroup, thread affinity, live XML and its own count.

    Args:
        seen: the guests now.
        wanted: their shares.
        first: the guests when `START` was right; what the guest's kernel keeps of its memory for
            itself is learnt from there.
    """
    findings = []
    for name, share in wanted.items():
        now, report = seen[name], first[name].report
        boot = next(g.memory for g in GUESTS if g.name == name)
        plugged = (share.memory - boot) * checker.MIB
        known = report.memory if report else 0
        grown = (share.memory - START[name].memory) * checker.MIB
        findings += [
            checker.expect_quota(now, share.cpu),
            checker.expect_affinity(now, share.cpus),
            checker.expect_vcpus(now, share.vcpus),
            checker.expect_plugged(now, plugged),
            checker.expect_guest_memory(now, known + grown),
        ]
    return findings


def dedicated_shares(seen: dict[str, Observation], *, unplugs: bool) -> dict[str, Share]:
    """Act 6: the database has one pCPU, whichever the agent chose, the others the other one."""
    own = seen["database"].cpus if len(seen["database"].cpus) == 1 else frozenset({1})
    rest = CORNER - own
    return {
        "batch": replace(START["batch"], cpus=rest),
        "web": replace(START["web"], cpus=rest),
        "database": replace(released_shares(unplugs=unplugs)["database"], cpu=None, cpus=own),
    }


def config() -> dict[str, dict[str, object]]:
    """The agent's configuration: a corner of this machine, nearly full."""
    return {
        "capacity": {
            "cpus": checker.format_cpu_list(CORNER),
            "housekeeping": "0",
            "memory": f"{MEMORY}M",
            "reserve": f"{RESERVE}M",
            "overhead": f"{OVERHEAD}M",
        },
    }
