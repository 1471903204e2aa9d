"""The handler contract for huge pages, below a sysfs whose kernel follows; and what a crash leaves.

What is asserted of the pool is what the administrator's own `cat` would show.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "hugepages"))

from pagekernel import LARGE, SMALL, PageKernel

from tests.contract.handler_contract import Context, HandlerContract
from virtfabric.adapters.registry import HandlerRegistry
from virtfabric.model.errors import (
    HugePagesError,
    Reason,
    RefusedError,
    ShortfallError,
    StepCancelledError,
    VerificationError,
)
from virtfabric.model.hugepages import MakeHugePages
from virtfabric.model.ids import GuestId
from virtfabric.model.units import GIB, MIB

if TYPE_CHECKING:
    from virtfabric.model.step import Step

DB = GuestId("00000000-0000-4000-8000-000000000001")
WEB = GuestId("00000000-0000-4000-8000-000000000002")
MAKE = MakeHugePages(guest=DB, name="db", node=0, page=2 * MIB, before=0, after=512, free=512)
MAKE_LARGE = MakeHugePages(guest=DB, name="db", node=1, page=GIB, before=0, after=2, free=2)


class PoolWorld:
    def __init__(self, directory: Path) -> None:
        self.kernel = PageKernel(directory)
        self.kernel.set(SMALL, 10)
        self.handlers = HandlerRegistry((self.kernel.handler,))

    def steps(self) -> list[Step]:
        return [MAKE, MAKE_LARGE]

    def observe(self, step: Step) -> Any:
        return self.kernel.pages.read_pools()

    def vanish(self, step: Step) -> None:
        """No guest has anything to do with it."""

    def apply(self, step: Step) -> None:
        self.handlers.for_step(step).apply(step, Context())

    def undo(self, step: Step) -> None:
        assert self.handlers.for_step(step).undo(step) == 0

    def made(self, pool: Any = SMALL) -> dict[GuestId, int]:
        return dict(self.kernel.pages.read_pools().pools[pool].made)


@pytest.fixture
def world(tmp_path: Path) -> PoolWorld:
    return PoolWorld(tmp_path)


class TestPools(HandlerContract):
    pass


def test_two_guests_and_an_administrator_share_a_pool(world: PoolWorld) -> None:
    world.apply(MAKE)
    world.apply(replace(MAKE, guest=WEB, name="web", after=100))
    assert world.kernel.sizes[SMALL] == 10 + 512 + 100
    world.undo(MAKE)
    assert world.kernel.sizes[SMALL] == 10 + 100
    assert world.made() == {WEB: 100}
    world.apply(replace(MAKE, guest=WEB, name="web", before=100, after=0, free=0))
    assert (world.kernel.sizes[SMALL], world.made()) == (10, {})


def test_pages_in_use_stay_and_go_back_later(world: PoolWorld) -> None:
    """Free ones are all that is taken: the administrator's ten are never fewer."""
    world.apply(MAKE)
    world.kernel.use(SMALL, 500)
    back = replace(MAKE, before=512, after=0, free=0)
    with pytest.raises(ShortfallError) as caught:
        world.apply(back)
    assert caught.value.reached == 490
    assert (world.kernel.sizes[SMALL], world.made()) == (500, {DB: 490})
    assert world.kernel.total(SMALL) == 500  # none became surplus
    with pytest.raises(VerificationError):
        world.handlers.for_step(back).verify(back)
    world.kernel.use(SMALL, 0)
    world.apply(back)
    world.handlers.for_step(back).verify(back)
    assert (world.kernel.sizes[SMALL], world.made()) == (10, {})


def test_what_is_promised_to_somebody_is_not_free(world: PoolWorld) -> None:
    world.apply(MAKE)
    world.kernel.reserved[2 * MIB] = 522
    world.kernel.show()
    with pytest.raises(RefusedError, match="522 free, 522 of these promised"):
        world.apply(MAKE)
    with pytest.raises(ShortfallError):
        world.apply(replace(MAKE, before=512, after=0, free=0))
    assert world.kernel.sizes[SMALL] == 522


def test_compaction_helps_where_memory_is_scattered(world: PoolWorld) -> None:
    world.kernel.whole[0], world.kernel.scattered[0] = 100 * MIB, 4 * GIB
    world.kernel.show()
    world.apply(MAKE)
    assert world.made() == {DB: 512}
    assert "devices/system/node/node0/compact" in world.kernel.written


def test_without_numa_all_memory_is_compacted(tmp_path: Path) -> None:
    kernel = PageKernel(tmp_path, numa=False)
    kernel.whole[0], kernel.scattered[0] = 0, 4 * GIB
    kernel.show()
    kernel.handler.apply(MAKE, Context())
    assert kernel.sizes[SMALL] == 512
    assert "sys/vm/compact_memory" in kernel.written


def test_too_few_is_told_with_figures_and_given_back(world: PoolWorld) -> None:
    world.kernel.whole[0] = 200 * MIB
    world.kernel.show()
    with pytest.raises(RefusedError) as caught:
        world.apply(MAKE)
    refusal = caught.value.refusal
    assert refusal.reason is Reason.NO_HUGE_PAGES
    assert refusal.would_fit == {"huge-pages-2048kB@node:0": 100}
    for words in ("100 of 512 more", "node 0", "the pool has 110, 110 free", "at boot"):
        assert words in refusal.detail
    world.undo(MAKE)
    assert (world.kernel.sizes[SMALL], world.made()) == (10, {})


def test_gigantic_pages_are_refused_with_other_advice(world: PoolWorld) -> None:
    world.kernel.whole[1] = GIB
    world.kernel.show()
    with pytest.raises(RefusedError, match=r"1 of 2 more .* seldom to be had .*hugepagesz=1024M"):
        world.apply(MAKE_LARGE)
    world.undo(MAKE_LARGE)
    assert world.kernel.sizes[LARGE] == 0


def test_a_check_alone_makes_nothing(world: PoolWorld) -> None:
    enough = replace(MAKE, after=0, free=10)
    world.apply(enough)
    with pytest.raises(RefusedError, match=r"needs 11 free .* the pool has 10, 10 free"):
        world.apply(replace(enough, free=11))
    assert "devices/system/node/node0/hugepages" not in " ".join(world.kernel.written[1:])


def test_a_cancelled_step_is_undone_where_it_stands(world: PoolWorld) -> None:
    class Impatient(Context):
        def progress(self, fraction: float, text: str) -> None:
            super().progress(fraction, text)
            self.cancelled.set()

    with pytest.raises(StepCancelledError):
        world.handlers.for_step(MAKE).apply(MAKE, Impatient())
    assert world.made() == {DB: 256}  # the first part of two
    world.undo(MAKE)
    assert (world.kernel.sizes[SMALL], world.made()) == (10, {})


@pytest.mark.parametrize("size", [5, 300, 600])
def test_a_pool_that_somebody_set_is_theirs(world: PoolWorld, size: int) -> None:
    world.apply(MAKE)
    world.kernel.set(SMALL, size)
    assert world.made() == {}
    world.undo(MAKE)
    assert world.kernel.sizes[SMALL] == size
    world.apply(MAKE)
    assert world.kernel.sizes[SMALL] == size + 512
    world.undo(MAKE)
    assert world.kernel.sizes[SMALL] == size


def test_what_becomes_somebody_elses_is_told_once(
    world: PoolWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world.apply(MAKE)
    world.kernel.set(SMALL, 600)
    pages = world.kernel.pages
    for _ in range(3):
        assert not pages.read_pools().pools[SMALL].made
    (record,) = caplog.records
    assert "set it to 600 pages (we left 522, 512 of them ours)" in record.getMessage()


def test_somebody_who_changes_the_pool_meanwhile_stops_us(world: PoolWorld) -> None:
    class Meddling(Context):
        def progress(self, fraction: float, text: str) -> None:
            world.kernel.set(SMALL, 1000)

    with pytest.raises(HugePagesError, match="somebody else changes"):
        world.handlers.for_step(MAKE).apply(MAKE, Meddling())
    world.undo(MAKE)
    assert (world.kernel.sizes[SMALL], world.made()) == (1000, {})


@pytest.mark.parametrize("moment", range(4))
def test_after_a_kill_the_pool_itself_says_how_far_it_came(
    world: PoolWorld, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before or after either of the two parts: the file has the intent alone by then."""
    kernel, write = world.kernel, world.kernel.write
    world.apply(replace(MAKE, guest=WEB, name="web", after=7, free=0))
    tally = kernel.tallies / "node0-2048kB.json"
    moments: list[tuple[int, str]] = []

    def watched(path: Path, text: str) -> None:
        moments.append((kernel.sizes[SMALL], tally.read_text()))
        write(path, text)
        moments.append((kernel.sizes[SMALL], tally.read_text()))

    monkeypatch.setattr(kernel, "write", watched)
    kernel.handler.apply(MAKE, Context())
    monkeypatch.undo()
    assert [size for size, _ in moments] == [17, 17 + 256, 17 + 256, 17 + 512]
    size, text = moments[moment]
    kernel.set(SMALL, size)
    tally.write_text(text)
    made = {DB: size - 17} if size > 17 else {}
    assert world.made() == {WEB: 7} | made
    world.undo(MAKE)
    assert (kernel.sizes[SMALL], world.made()) == (17, {WEB: 7})


def test_a_tally_that_is_garbage_claims_nothing(world: PoolWorld) -> None:
    world.apply(MAKE)
    (world.kernel.tallies / "node0-2048kB.json").write_text("{")
    world.undo(MAKE)
    assert world.kernel.sizes[SMALL] == 522
    assert world.made() == {}


def test_a_reboot_forgets_both_pages_and_tally(world: PoolWorld, tmp_path: Path) -> None:
    world.apply(MAKE)
    again = PoolWorld(tmp_path / "next-boot")
    again.undo(MAKE)
    assert again.kernel.sizes[SMALL] == 10


def test_surplus_pages_are_not_the_pools(world: PoolWorld) -> None:
    world.kernel.use(SMALL, 10)
    world.kernel.set(SMALL, 4)
    found = world.kernel.pages.read_pools().pools[SMALL].pages
    assert (found.total, found.surplus, found.persistent, found.free) == (10, 6, 4, 0)


def test_an_undo_makes_again_what_it_can(world: PoolWorld) -> None:
    """It must not fail: a start of the agent may depend on it."""
    world.apply(MAKE)
    back = replace(MAKE, before=512, after=0, free=0)
    world.apply(back)
    world.kernel.whole[0] = 100 * MIB
    world.kernel.show()
    world.undo(back)
    assert world.made() == {DB: 50}


def test_an_undo_of_a_pool_that_is_gone_has_nothing_to_do(world: PoolWorld) -> None:
    gone = replace(MAKE, node=7)
    with pytest.raises(HugePagesError, match="no pool of huge pages of 2MiB on node 7"):
        world.apply(gone)
    world.undo(gone)
