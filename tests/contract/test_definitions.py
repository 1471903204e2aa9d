"""`ports.DefinitionEditor`, real (libvirt's own test driver) and simulated, by one contract."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtfabric.adapters.libvirt.connection import LibvirtConnection
from virtfabric.adapters.libvirt.definitions import LibvirtDefinitions
from virtfabric.adapters.simulated.machines import DATABASE, small_host
from virtfabric.model.errors import GuestGoneError, StaleDefinitionError
from virtfabric.model.ids import GuestId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtfabric.ports import DefinitionEditor

NOBODY = GuestId("00000000-0000-4000-8000-00000000dead")
SECRET = f"""<domain type='test'><name>db</name><uuid>{DATABASE}</uuid><memory>1024</memory>
<os><type>hvm</type></os>
<devices><graphics type='vnc' port='5999' passwd='geheim'/></devices></domain>"""


@pytest.fixture(params=["libvirt", "simulated"])
def editor(request: pytest.FixtureRequest) -> Iterator[DefinitionEditor]:
    if request.param == "simulated":
        host = small_host()
        host.stop_guest(DATABASE)
        yield host.definitions
        return
    connection = LibvirtConnection("test:///default")
    connection.raw.defineXML(SECRET)
    yield LibvirtDefinitions(connection)
    connection.close()


def test_what_is_defined_reads_back(editor: DefinitionEditor) -> None:
    found = editor.read_definitions(DATABASE)
    assert found.live is None
    assert found.persistent is not None
    other = found.persistent.replace("hvm</type>", "hvm</type><boot dev='network'/>")
    editor.replace_definition(DATABASE, found.persistent, other)
    now = editor.read_definitions(DATABASE).persistent
    assert now is not None
    assert "<boot dev='network'/>" in now


def test_somebody_elses_change_is_not_overwritten(editor: DefinitionEditor) -> None:
    before = editor.read_definitions(DATABASE).persistent
    assert before is not None
    with pytest.raises(StaleDefinitionError):
        editor.replace_definition(DATABASE, before.replace("hvm", "xen"), before)
    assert editor.read_definitions(DATABASE).persistent == before


def test_a_guest_that_is_not_there(editor: DefinitionEditor) -> None:
    with pytest.raises(GuestGoneError):
        editor.read_definitions(NOBODY)
    with pytest.raises(GuestGoneError):
        editor.replace_definition(NOBODY, "", "")


def test_libvirt_keeps_a_password_through_a_change() -> None:
    connection = LibvirtConnection("test:///default")
    connection.raw.defineXML(SECRET)
    editor = LibvirtDefinitions(connection)
    before = editor.read_definitions(DATABASE).persistent
    assert before is not None
    editor.replace_definition(DATABASE, before, before.replace("5999", "5998"))
    now = editor.read_definitions(DATABASE).persistent
    connection.close()
    assert now is not None
    assert "5998" in now
    assert "passwd='geheim'" in now
