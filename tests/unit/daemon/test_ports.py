"""`ports` and `ports add` through the facade: authorised, audited, undone when it went wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import agent_world as aw
import pytest

from virtfabric.adapters.simulated.definitions import SimulatedDefinitions
from virtfabric.daemon.portdesk import PortDesk
from virtfabric.model.errors import (
    InvalidValueError,
    Reason,
    RefusedError,
    VerificationError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.model.ids import GuestId
    from virtfabric.ports import Definitions

DATABASE = aw.uuid_of(90)


@pytest.fixture
def world() -> Iterator[aw.AgentWorld]:
    yield from aw.world_fixture()


def kinds(world: aw.AgentWorld) -> list[str]:
    return [r.kind for r in world.audit.read(subject=DATABASE) if r.kind.startswith("ports.")]


def persistent(world: aw.AgentWorld) -> str:
    return str(world.host.definitions.read_definitions(DATABASE).persistent)


def test_added_ports_are_there_at_the_next_boot_only(world: aw.AgentWorld) -> None:
    done = world.agent.ports_add(aw.ROOT, "database", 3)
    assert done["added"] == [3, 4, 5]
    assert (done["live"]["free"], done["persistent"]["free"]) == (2, 5)
    world.host.stop_guest(DATABASE)
    assert world.agent.ports(aw.ROOT, "database")["live"] is None
    world.host.start_guest(DATABASE)
    assert world.agent.ports(aw.ROOT, "database")["live"]["free"] == 5
    assert kinds(world) == ["ports.adding", "ports.added"]


def test_it_takes_the_right_to_change_policies(world: aw.AgentWorld) -> None:
    before = persistent(world)
    with pytest.raises(RefusedError) as refused:
        world.agent.ports_add(aw.NOBODY, "database", 1)
    assert refused.value.refusal.reason is Reason.NOT_ALLOWED
    assert persistent(world) == before
    assert world.agent.ports(aw.NOBODY, "database")["persistent"]["free"] == 2
    assert world.agent.ports_add(aw.ALICE, "database", 1)["added"] == [3]


def test_what_cannot_be_changes_nothing(world: aw.AgentWorld) -> None:
    before = persistent(world)
    with pytest.raises(InvalidValueError, match="count"):
        world.agent.ports_add(aw.ROOT, "database", 0)
    with pytest.raises(RefusedError) as refused:
        world.agent.ports_add(aw.ROOT, "database", 1000)
    assert refused.value.refusal.reason is Reason.NO_CAPACITY
    with pytest.raises(RefusedError) as refused:
        world.agent.ports_add(aw.ROOT, "nobody", 1)
    assert refused.value.refusal.reason is Reason.UNKNOWN_GUEST
    assert persistent(world) == before
    assert kinds(world) == []


def test_a_transient_guest_has_no_next_boot(world: aw.AgentWorld) -> None:
    world.host.undefine_guest(DATABASE)
    with pytest.raises(RefusedError, match="transient") as refused:
        world.agent.ports_add(aw.ROOT, "database", 1)
    assert refused.value.refusal.reason is Reason.NO_MECHANISM


def test_another_definition_than_asked_for_is_taken_back(world: aw.AgentWorld) -> None:
    before = persistent(world)
    definitions = world.host.definitions
    definitions.mangle = lambda text: text if text == before else text.replace("q35", "q36")
    with pytest.raises(VerificationError, match="more than the ports changed"):
        world.agent.ports_add(aw.ROOT, "database", 1)
    assert persistent(world) == before
    assert kinds(world) == ["ports.adding", "ports.failed"]


class EditedMeanwhile(SimulatedDefinitions):
    """Somebody else defines the guest anew right after it was read."""

    def read_definitions(self, guest: GuestId) -> Definitions:
        found = super().read_definitions(guest)
        if found.persistent is not None:
            self._persistent[guest] = found.persistent.replace("'q35'", "'pc-q35-7.2'")
        return found


def test_a_definition_that_changed_meanwhile_is_not_overwritten(world: aw.AgentWorld) -> None:
    editor = EditedMeanwhile(world.host)
    state = world.host.read_guest(DATABASE)
    assert state is not None
    with pytest.raises(RefusedError) as refused:
        PortDesk(editor, world.audit).add(state, 1, by="root")
    assert refused.value.refusal.reason is Reason.STALE
    persistent = editor.read_definitions(DATABASE).persistent
    assert persistent is not None
    assert persistent.count("pcie-root-port") == 2
    assert "pc-q35-7.2" in persistent
