"""A lab's life: up, down, and what there is.

Owns the order of things: whatever can fail without a QEMU comes first, and a lab that does not come
up is taken down again.
"""

from __future__ import annotations

import shlex
import socket
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, assert_never

from virtfabric.model.errors import InvalidValueError
from virtfabric.shim.guestimage import ensure_guest_image
from virtfabric.shim.kvmprobe import can_nest, probe_kvm
from virtfabric.shim.lab import health
from virtfabric.shim.lab.boot import (
    end_qemu,
    failure,
    is_ready,
    read_last_words,
    read_told,
    start_qemu,
    wait_for_qemu,
    wait_until_ready,
)
from virtfabric.shim.lab.cards import (
    APPEAR_S,
    CONFIG,
    cards_of,
    end_cards,
    format_config,
    format_search,
    host_files,
    provision_cards,
)
from virtfabric.shim.lab.faults import Scene
from virtfabric.shim.lab.image import ensure_lab_image
from virtfabric.shim.lab.machine import format_arguments
from virtfabric.shim.lab.outer import choose_outer
from virtfabric.shim.lab.payload import write_payload
from virtfabric.shim.lab.place import LabError, Place, Record, find_places, place_of
from virtfabric.shim.lab.remote import Remote, ensure_keys
from virtfabric.shim.lab.room import (
    check_disk,
    check_memory,
    check_sockets,
    read_available,
    read_free,
)
from virtfabric.shim.topology.arguments import backing_files
from virtfabric.shim.topology.needs import device_needs, needs_tcg
from virtfabric.shim.topology.text import format_topology, parse_topology

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtfabric.shim.guestimage import GuestImage
    from virtfabric.shim.lab.cards import LabCard
    from virtfabric.shim.lab.machine import Accel
    from virtfabric.shim.lab.outer import OuterQemu
    from virtfabric.shim.topology.model import Topology

BOOT_S: Final = 300.0
"""How long a lab may take to come up; it is some 20 s on a quiet machine without KVM."""

_ANSWER_S: Final = APPEAR_S + 60.0
"""How long a host may take to answer where its cards are."""
_SWITCH_S: Final = 60.0
"""How long a switch of a card's power waits for another one."""


class State(StrEnum):
    """What a lab is doing; while a command is at work on it, it is not dead."""

    READY = "ready"
    STARTING = "starting"
    DEAD = "dead"


class Power(StrEnum):
    """What is done to a card."""

    OFF = "off"
    ON = "on"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class Status:
    """A lab as `list` and `status` show it.

    Attributes:
        told: what its PID 1 has said so far, with the seconds since the kernel's start.
        last_words: of a dead lab, what its QEMU said last.
    """

    name: str
    state: State
    pid: int | None
    record: Record | None
    told: tuple[str, ...]
    last_words: tuple[str, ...] = ()


def up(
    topology: Topology,
    *,
    name: str,
    title: str,
    report: Callable[[str], None],
    boot_s: float = BOOT_S,
    keep: bool = False,
) -> Status:
    """Bring up a lab and wait until it is ready.

    Args:
        topology: what it looks like.
        name: of the lab; several run side by side.
        title: what `list` shows for the topology.
        report: receives a line for each step.
        boot_s: how long it may take from QEMU's start.
        keep: leave a lab that did not come up as it is, for a look.

    Raises:
        LabError: there is one by that name, or it did not come up.
        BuildError: image or QEMU cannot be had.
    """
    place = place_of(name)
    check_sockets(topology, place)
    with place.locked():
        if place.read_pid() is not None:
            raise LabError(f"lab {name} is up already; `virtfabric lab down {name}` ends it")
        _end(place)  # what a killed `up` left
        check_memory(topology, name, read_available())
        check_disk(place, read_free(place.directory.parent))
        place.directory.mkdir(parents=True, mode=0o700)
        came_up = False
        try:
            _start(topology, place, title, report)
            wait_until_ready(place, report, boot_s)
            _start_cards(topology, place, report)
            came_up = True
        finally:
            if not came_up and not keep:
                _end(place)
    return read_status(place)


def down(name: str) -> bool:
    """End a lab and take away all that is left of it.

    Returns:
        Whether there was one.

    Raises:
        LabError: another command starts or ends it just now.
    """
    place = place_of(name)
    with place.locked():
        was_there = place.directory.exists()
        record = place.read_record()
        if record is not None and place.read_pid() is not None:
            Remote(place, record, ensure_keys()).close()
        _end(place)
    return was_there


def _end(place: Place) -> None:
    """All that runs for a lab, and all that is left of it."""
    end_qemu(place)
    end_cards(place)
    place.remove()


def read_status(place: Place) -> Status:
    """What there is to say of one lab."""
    pid = place.read_pid()
    if pid is None:
        # an `up` builds an image for minutes before there is a QEMU
        state = State.STARTING if place.is_locked() else State.DEAD
    else:
        state = State.READY if is_ready(place) else State.STARTING
    last_words = read_last_words(place) if state is State.DEAD else ()
    told = tuple(read_told(place))
    return Status(place.name, state, pid, place.read_record(), told, tuple(last_words))


def find_faults(status: Status) -> list[str]:
    """What of a lab has hung or fallen over by no doing of what runs in it (`health`).

    Raises:
        LabError: it is not up yet, so that nobody can look.
    """
    if status.state is State.DEAD:
        return ["the lab's QEMU has ended", *status.last_words]
    if status.state is State.STARTING or status.record is None:
        raise LabError(f"lab {status.name} is not up yet; `virtfabric lab console {status.name}`")
    return health.find_faults(Remote(place_of(status.name), status.record, ensure_keys()))


def read_labs() -> list[Status]:
    """All labs there are, by name."""
    return [read_status(place) for place in find_places()]


def connect(name: str) -> Remote:
    """The way into a running lab.

    Raises:
        LabError: there is none by that name, or it is not ready.
    """
    place = place_of(name)
    status = read_status(place)
    if status.record is None or status.state is not State.READY:
        known = ", ".join(lab.name for lab in read_labs() if lab.state is State.READY) or "none"
        if not place.directory.exists():
            raise LabError(f"there is no lab {name}; up: {known}")
        raise LabError(f"lab {name} is {status.state}; `virtfabric lab console {name}` shows why")
    return Remote(place, status.record, ensure_keys())


def read_scene(name: str) -> Scene:
    """Where a fault of a running lab happens.

    Raises:
        LabError: there is none by that name, or it is not ready.
    """
    remote = connect(name)
    place = place_of(name)
    return Scene(place, parse_topology(place.topology.read_text()), remote)


def switch_card(name: str, serial: str, power: Power) -> str:
    """Cut an offload card of a running lab off from power, or give it power.

    Returns:
        A line that says what was done.

    Raises:
        LabError: there is no such lab, or the card is not as it would have to be.
        InvalidValueError: the lab has no such card.
    """
    # as `down` looks for cards' processes once: none may come after that
    with place_of(name).locked(patience_s=_SWITCH_S):
        return _switch_card(read_scene(name), serial, power)


def _switch_card(scene: Scene, serial: str, power: Power) -> str:
    cards = {card.serial: card for card in cards_of(scene.topology, scene.place)}
    if serial not in cards:
        known = ", ".join(cards) or "none"
        raise InvalidValueError("card", serial, "is not in this lab", advice=f"there are {known}")
    card = cards[serial]
    match power:
        case Power.OFF:
            if not card.kill():
                raise LabError(f"card {serial} is off already")
            return f"card {serial} has died: its functions answer no more"
        case Power.ON:
            card.start()
            return f"card {serial} is on, with what it kept"
        case Power.REPLACE:
            card.kill()
            card.flash.unlink(missing_ok=True)
            card.start()
            return f"card {serial} is another one: the same serial number, an empty memory"
        case _:
            assert_never(power)


def _start(topology: Topology, place: Place, title: str, report: Callable[[str], None]) -> None:
    outer = choose_outer(device_needs(topology), report)
    image = ensure_lab_image(report)
    guest = ensure_guest_image(report=report)
    accel, why = choose_accel(topology, guest, outer)
    carrier = f"{accel} ({why})" if why else accel
    version = f"QEMU {outer.read_version()}, {outer.origin}"
    report(f"starting {place.name} ({title}) on {version}, with {carrier}")
    place.topology.write_text(format_topology(topology))
    provision_cards(cards_of(topology, place))
    write_payload(
        place.payload, guest, ensure_keys(), host_files(place) if topology.cards else None
    )
    for file in backing_files(topology, place.directory):
        with file.path.open("wb") as disk:
            disk.truncate(file.size)
    port = _choose_port()  # only now, or somebody else has it when QEMU binds it
    place.write_record(Record(place.name, title, port, time.time(), version, carrier))
    arguments = format_arguments(
        topology, image, place, accel=accel, port=port, epoch=int(time.time())
    )
    wait_for_qemu(place, start_qemu(place, [*outer.argv, *arguments]))


def _start_cards(topology: Topology, place: Place, report: Callable[[str], None]) -> None:
    """Cards come to a host that is up, by hot-plug; the host learns where their mailboxes are.

    Raises:
        LabError: one did not start or did not come, or the host does not answer.
    """
    cards = cards_of(topology, place)
    record = place.read_record()
    if not cards or record is None:
        return
    try:
        _plug_cards(topology, cards, Remote(place, record, ensure_keys()), report)
    except LabError as error:
        raise failure(place, str(error), error.log) from error


def _plug_cards(
    topology: Topology, cards: Sequence[LabCard], remote: Remote, report: Callable[[str], None]
) -> None:
    for card in cards:
        report(f"starting card {card.serial}")
        card.start()
    ways: dict[str, str] = {}
    for card in cards:
        done = remote.run(format_search(topology, card.ports[0]), timeout_s=_ANSWER_S)
        if done.returncode:
            log = card.log.read_text(errors="replace").splitlines()[-10:]
            raise LabError(f"card {card.serial} did not come to the lab", log=log)
        ways[card.serial] = done.stdout.strip()
    config = shlex.quote(format_config(ways))
    done = remote.run(
        f"mkdir -p {Path(CONFIG).parent} && printf %s {config} > {CONFIG}", timeout_s=_ANSWER_S
    )
    if done.returncode:
        raise LabError(f"{CONFIG}: {done.stderr.strip()}")
    report(", ".join(f"card {serial} is at {address}" for serial, address in ways.items()))


def choose_accel(
    topology: Topology,
    guest: GuestImage,
    outer: OuterQemu,
    *,
    nests: Callable[[], bool] = can_nest,
) -> tuple[Accel, str]:
    """KVM where it really runs a guest and the topology allows it.

    Not where KVM gives its guests none of their own: a lab's guests are KVM guests.

    Returns:
        Also why it is TCG where KVM would have run; empty where there is nothing to say.
    """
    why = ""
    if not needs_tcg(topology) and probe_kvm(guest):
        if nests():
            return "kvm", ""
        why = "KVM here has nested=0: the lab could run no KVM guests"
    alone = topology.cpu.max_vcpus == 1
    return ("tcg" if alone or outer.has_safe_threads() else "tcg with one thread"), why


def _choose_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
