"""How often functions are read, and by whom: each who asks sees what is, nobody looks in vain."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import agent_world as aw
import pytest

from virtfabric.adapters.clock import SystemClock
from virtfabric.adapters.simulated.devices import small_devices
from virtfabric.daemon.ledger import Ledger
from virtfabric.daemon.observatory import Observatory
from virtfabric.model.device import DeviceNews, DevicePool, Match, PciAddress, PciFunction
from virtfabric.model.ledger import Books

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

A, B, C = (PciAddress(f"0000:00:0{n}.0") for n in (1, 2, 3))
Read = tuple[frozenset[PciAddress] | None, frozenset[PciAddress] | None]


class SlowTree:
    """A tree of one function whose reading goes on for as long as the test wants it to."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def read_functions(
        self,
        only: Collection[PciAddress] | None = None,
        settings: Collection[PciAddress] | None = None,
    ) -> dict[PciAddress, PciFunction]:
        words = [None if one is None else frozenset(one) for one in (only, settings)]
        self.reads.append((words[0], words[1]))
        self.begun.release()
        assert self.go.acquire(timeout=aw.DEADLINE_S)
        return {A: PciFunction(A)}

    def watch(self, changed: Callable[[DeviceNews], None]) -> None:
        """Nothing changes here."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def tree() -> SlowTree:
    return SlowTree()


@pytest.fixture
def observatory(tree: SlowTree) -> Observatory:
    world = aw.AgentWorld()
    return Observatory(
        world.host, tree, Ledger(Books()), world.topology, world.capacity, (),
        world.host.pages, clock=SystemClock(), lend_ballooned=False,
    )  # fmt: skip


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(aw.DEADLINE_S)
    return not any(thread.is_alive() for thread in threads)


class Waiting(threading.Thread):
    """Asks for a look, and tells when it has asked."""

    def __init__(self, observatory: Observatory, only: Collection[PciAddress] | None) -> None:
        super().__init__()
        self.asked_at = time.monotonic()
        self._look = lambda: observatory.refresh_devices(only, since=self.asked_at)
        self.start()

    def run(self) -> None:
        self._look()


def test_a_look_that_had_begun_before_serves_nobody_and_the_next_serves_all(
    tree: SlowTree, observatory: Observatory
) -> None:
    first = start(observatory.refresh_devices)
    assert tree.begun.acquire(timeout=aw.DEADLINE_S)
    waiting = [Waiting(observatory, only) for only in (None, None, None)]
    tree.go.release()
    assert tree.begun.acquire(timeout=aw.DEADLINE_S)
    tree.go.release()
    assert ended(first, *waiting)
    assert tree.reads == [(None, None)] * 2


def test_a_look_at_all_serves_who_wants_one_but_not_the_other_way_round(
    tree: SlowTree, observatory: Observatory
) -> None:
    tree.go.release(9)
    before = time.monotonic()
    observatory.refresh_devices([A, B])
    for served in ([A], [B, A]):
        observatory.refresh_devices(served, since=before)
    assert len(tree.reads) == 1
    observatory.refresh_devices([A, C], since=before)
    observatory.refresh_devices(since=before)
    assert tree.reads[1:] == [(frozenset({A, C}),) * 2, (None, None)]
    observatory.refresh_devices([A, B, C], since=before)
    observatory.refresh_devices([C], settings=(), since=before)
    assert len(tree.reads) == 3


def test_a_look_without_settings_serves_nobody_who_wants_them(
    tree: SlowTree, observatory: Observatory
) -> None:
    tree.go.release(9)
    before = time.monotonic()
    observatory.refresh_devices(settings=[A])
    observatory.refresh_devices([A, B], settings=[A], since=before)
    assert len(tree.reads) == 1
    observatory.refresh_devices([B], since=before)
    assert tree.reads[1:] == [(frozenset({B}), frozenset({B}))]


def test_a_look_that_failed_serves_nobody(tree: SlowTree, observatory: Observatory) -> None:
    before, whole = time.monotonic(), tree.read_functions

    def fail(*_: object) -> dict[PciAddress, PciFunction]:
        raise OSError("gone")

    tree.go.release(9)
    tree.read_functions = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"):
        observatory.refresh_devices(since=before)
    tree.read_functions = whole  # type: ignore[method-assign]
    observatory.refresh_devices(since=before)
    assert tree.reads == [(None, None)]


# -- an agent's own work --------------------------------------------------------------------------

NET = DevicePool("net.vf", Match(ids=frozenset({"8086:10ca"})))


class CountedWorld(aw.AgentWorld):
    """Notes who reads which functions. What changes is told when the test says so, as a burst."""

    def __post_init__(self) -> None:
        super().__post_init__()
        devices = self.host.devices
        self.reads: list[Read] = []
        self._told: list[DeviceNews] = []
        read, watch = devices.read_functions, devices.watch

        def note(
            only: Collection[PciAddress] | None = None,
            settings: Collection[PciAddress] | None = None,
        ) -> dict[PciAddress, PciFunction]:
            words = [None if one is None else frozenset(one) for one in (only, settings)]
            self.reads.append((words[0], words[1]))
            return read(only, settings)

        def hear(changed: Callable[[DeviceNews], None]) -> None:
            self._changed = changed
            watch(self._told.append)

        devices.read_functions = note  # type: ignore[method-assign]
        devices.watch = hear  # type: ignore[method-assign]

    def tell_burst(self) -> None:
        told, self._told[:] = list(self._told), []
        about = frozenset[PciAddress]().union(*(news.functions or () for news in told))
        assert about
        self._changed(DeviceNews(about, max(news.at for news in told)))

    def take(self) -> list[Read]:
        reads, self.reads[:] = list(self.reads), []
        return reads


@pytest.fixture
def world() -> Iterator[CountedWorld]:
    made = CountedWorld(functions=small_devices(), settings={"pools": (NET,)})
    made.start()
    made.settle()
    made.take()
    yield made
    made.close()


def test_one_look_at_all_functions_for_an_allocation_and_none_for_its_end(
    world: CountedWorld,
) -> None:
    """Before: four and three, each of everything and with ip(8) for each PF."""
    job = world.allocate("web", **{"device:net.vf": "+1"})
    assert job["state"] == "done", job["error"]
    [address] = world.functions_of("web")
    own: Read = (frozenset({PciAddress(address)}), frozenset())
    assert world.take() == [(None, frozenset()), own, own]
    world.tell_burst()  # of its own steps: the plan has read them back since
    world.settle()
    assert world.take() == []

    released = world.finish(world.agent.release(aw.ROOT, job["result"]["grant"])["job"])
    assert released["state"] == "done", released["error"]
    world.tell_burst()
    world.settle()
    assert world.take() == [own, own]


def test_what_happens_to_one_function_is_read_of_that_one(world: CountedWorld) -> None:
    address = PciAddress("0000:03:00.0")
    world.host.devices.change(address, driver="vfio-pci")
    world.tell_burst()
    world.settle()
    assert world.take() == [(frozenset({address}), frozenset())]
    found = world.agent.devices(aw.ROOT)
    assert next(f for f in found if f["address"] == address)["driver"] == "vfio-pci"


def test_news_of_no_function_are_read_of_none(world: CountedWorld) -> None:
    """A guest's tap device came up."""
    world._changed(DeviceNews(frozenset(), time.monotonic()))
    world.settle()
    assert world.take() == []


def test_news_that_name_nothing_are_read_of_all_and_several_at_once(world: CountedWorld) -> None:
    first, go = threading.Event(), threading.Event()

    def occupy() -> None:
        first.set()
        assert go.wait(aw.DEADLINE_S)

    world.agent._lifecycle._errands.put("devices", occupy)
    assert first.wait(aw.DEADLINE_S)
    for functions in (frozenset({A}), None, frozenset({B})):
        world._changed(DeviceNews(functions, time.monotonic()))
    go.set()
    world.settle()
    assert world.take() == [(None, frozenset())]
