"""Residues: what is struck off, what stays, and when nobody touches them."""

from __future__ import annotations

from dataclasses import replace

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.faults import Effect, Fault, Phase
from virtfabric.daemon.residues import still_left
from virtfabric.model.errors import HypervisorGoneError, JournalError
from virtfabric.model.ledger import Residue
from virtfabric.model.plan import ResizeVirtioMem
from virtfabric.model.units import MIB

A, B = aw.uuid_of(1), aw.uuid_of(2)


def _residue(guest, what, amount, since=1.0):
    return Residue(guest, what, amount, since, "left by an undo")


def test_what_is_found_stays_and_the_rest_goes():
    memory, vcpu = _residue(A, "memory", 64 * MIB), _residue(A, "vcpu", 1000)
    function, other = _residue(A, "device", 1), _residue(B, "memory", MIB)
    everything = (memory, vcpu, function, other)
    found = [_residue(A, "memory", 4 * MIB, since=9.0)]
    less = _residue(A, "memory", 4 * MIB)
    assert still_left(everything, {A}, found) == (less, function, other)
    assert still_left(everything, {A}, [memory, vcpu]) == everything
    assert still_left(everything, (), []) == everything


def test_two_of_a_kind_become_the_one_that_was_read():
    first, second = _residue(A, "memory", 8 * MIB), _residue(A, "memory", 2 * MIB, since=2.0)
    assert still_left((first, second), {A}, [_residue(A, "memory", 3 * MIB)]) == (
        _residue(A, "memory", 3 * MIB),
    )


@pytest.fixture
def world():
    """`plain` has given back what an undo had left with it, and nobody has looked yet."""
    world = aw.AgentWorld(specs=(aw.make_spec(50, "plain", 50),)).start()
    guest = aw.uuid_of(50)
    world.host.faults.add(Fault(Effect.FAIL, kind="resize-virtio-mem", phase=Phase.VERIFY))
    world.host.faults.gives[guest] = 0
    assert world.allocate("plain", memory="+128M")["state"] == "failed"
    world.host.faults.clear()
    yield world
    world.close()


def _give_back(world):
    (device,) = world.live("plain").virtio_mem
    world.host.change_beside(
        ResizeVirtioMem(
            guest=aw.uuid_of(50), alias=device.alias, before=device.current,
            after=device.current - 128 * MIB,
        )
    )  # fmt: skip


def _gone(*_):
    raise HypervisorGoneError("libvirtd is away")


def _full(*_):
    raise JournalError("no space left on device")


@pytest.mark.parametrize(
    ("part", "name", "instead"),
    [
        ("_observatory", "refresh", _gone),
        ("_journal", "store_books", _full),
        ("_observatory", "guest", lambda _: None),
    ],
)
def test_what_cannot_be_read_or_written_is_left_to_the_next_look(
    world, monkeypatch, part, name, instead
):
    residues = world.agent._lifecycle._conductor.residues
    with monkeypatch.context() as broken:
        broken.setattr(getattr(residues, part), name, instead)
        _give_back(world)
        residues.review(None)
        assert [r.amount for r in world.agent._ledger.view().books.residues] == [128 * MIB]
    residues.review(None)
    assert world.guest("plain")["residues"] == []


def test_what_a_plan_settles_meanwhile_is_not_told_as_late(world, monkeypatch):
    ledger, residues = world.agent._ledger, world.agent._lifecycle._conductor.residues
    now = residues._clock.now()

    def settle_beside():
        ledger.commit(None, lambda books: replace(books, residues=()), lambda _: None)
        return now

    with monkeypatch.context() as unseen:  # no event's own review strikes it off
        unseen.setattr(residues, "_review", lambda _: None)
        _give_back(world)
        world.settle()
    monkeypatch.setattr(residues._clock, "now", settle_beside)
    residues.review(None)
    monkeypatch.undo()
    assert ledger.view().books.residues == ()
    assert not [t for t in world.agent.explain(aw.ROOT, aw.uuid_of(50))["lines"] if "late" in t]
