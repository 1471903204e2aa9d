"""Huge pages on a real kernel: made on a node, checked, given back, and what is refused.

What the handler reports is not believed: sysfs is asked, in the shell. Somebody else's pages are an
administrator's, and those of a process that really touches them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from worker import carry_out, done, start_worker

from virtfabric.model.hugepages import MakeHugePages
from virtfabric.model.ids import GuestId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running_lab import RunningLab

MIB = 1 << 20
ADMIN = 4
COUNT = 32
GUEST = GuestId("00000000-0000-4000-8000-000000000001")
MAKE = MakeHugePages(
    guest=GUEST, name="db", node=0, page=2 * MIB, before=0, after=COUNT, free=COUNT,
    deadline_s=120,
)  # fmt: skip
BACK = replace(MAKE, before=COUNT, after=0, free=0)
POOL = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB"
TAKE = """
import mmap, sys, time
pages = mmap.mmap(-1, int(sys.argv[1]) << 21, flags=mmap.MAP_PRIVATE | 0x20 | 0x40000)
for at in range(0, len(pages), 1 << 21):
    pages[at] = 1
open("/tmp/taken", "w").close()
time.sleep(600)
"""
"""MAP_ANONYMOUS | MAP_HUGETLB: has so many huge pages, and touches each."""


@pytest.fixture(scope="module", autouse=True)
def worker(small: RunningLab) -> None:
    start_worker(small)
    small.run(f"cat > /tmp/take.py <<'X'\n{TAKE}\nX")


@pytest.fixture(autouse=True)
def own_pool(small: RunningLab) -> Iterator[None]:
    """An administrator has a few; they are there afterwards, too, and nothing else is."""
    small.run(f"echo {ADMIN} > {POOL}/nr_hugepages; rm -rf /run/virtfabric/hugepages")
    yield
    assert pool(small) == (ADMIN, ADMIN, 0)
    assert small.run("dmesg | grep -cE 'Out of memory|Oops|BUG:' || :") == "0"


def pool(lab: RunningLab) -> tuple[int, int, int]:
    """(pages, free, surplus)."""
    names = ("nr_hugepages", "free_hugepages", "surplus_hugepages")
    words = lab.run("cat " + " ".join(f"{POOL}/{name}" for name in names)).split()
    total, free, surplus = map(int, words)
    return total, free, surplus


def test_made_and_given_back(small: RunningLab) -> None:
    done(carry_out(small, ("apply", MAKE), ("apply", MAKE)))
    assert pool(small) == (ADMIN + COUNT, ADMIN + COUNT, 0)
    done(carry_out(small, ("apply", BACK), ("apply", BACK)))


def test_undone_as_after_a_crash(small: RunningLab) -> None:
    done(carry_out(small, ("apply", MAKE)))
    assert done(carry_out(small, ("undo", MAKE), ("undo", MAKE))) == [0, 0]


def test_pages_in_use_wait_and_none_becomes_surplus(small: RunningLab) -> None:
    done(carry_out(small, ("apply", MAKE)))
    used = ADMIN + COUNT - 6
    small.run(f"setsid python3 /tmp/take.py {used} > /dev/null 2>&1 & echo $! > /tmp/take.pid")
    small.wait("[ -e /tmp/taken ]")
    (short,) = carry_out(small, ("apply", BACK))
    assert short["error"] == "ShortfallError", short
    assert pool(small) == (used, 0, 0)
    (refused,) = carry_out(small, ("apply", replace(MAKE, after=COUNT - 6, free=1)))
    assert "needs 1 free huge pages" in refused["text"]
    small.run("kill $(cat /tmp/take.pid); rm /tmp/taken")
    small.wait(f"[ $(cat {POOL}/free_hugepages) = {used} ]")
    done(carry_out(small, ("apply", BACK)))


def test_more_than_there_can_be_is_refused_with_figures(small: RunningLab) -> None:
    """Nobody is killed for it, and what was made goes back."""
    greedy = replace(MAKE, after=1_000_000, free=1_000_000)
    (refused,) = carry_out(small, ("apply", greedy))
    assert refused["error"] == "RefusedError", refused
    for words in ("of 1000000 more huge pages of 2MiB on node 0", "after compaction", "at boot"):
        assert words in refused["text"]
    done(carry_out(small, ("undo", greedy)))


def test_gigantic_pages_come_or_are_refused(small: RunningLab) -> None:
    """Which one is the kernel's affair; that none stays is ours."""
    home = POOL.replace("2048kB", "1048576kB")
    step = replace(MAKE, page=1024 * MIB, after=1, free=1)
    (answer,) = carry_out(small, ("apply", step))
    if "error" in answer:
        assert "no pool" in answer["text"] or "hugepagesz=1024M" in answer["text"], answer
    else:
        assert small.run(f"cat {home}/nr_hugepages") == "1"
    if "no pool" not in answer.get("text", ""):
        done(carry_out(small, ("undo", step)))
        assert small.run(f"cat {home}/nr_hugepages") == "0"


def test_a_pool_that_somebody_sets_is_theirs(small: RunningLab) -> None:
    done(carry_out(small, ("apply", MAKE)))
    small.run(f"echo {ADMIN} > {POOL}/nr_hugepages")
    done(carry_out(small, ("undo", MAKE)))
