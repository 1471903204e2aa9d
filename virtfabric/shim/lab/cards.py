"""The offload cards of a lab: processes beside its QEMU, each with its ids, certificate and flash.

Owns their directory in the lab's, and finding the processes: by program and description in their
arguments, so that what a killed `lab up` left is found, too. What a host in the lab needs to reach
them is made with them: its own credentials, and images that they take.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfabric.shim.lab.death import kill_process
from virtfabric.shim.lab.place import LabError, find_processes
from virtfabric.shim.topology.seats import choose_seats

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from pathlib import Path

    from virtfabric.shim.lab.place import Place
    from virtfabric.shim.topology.model import Card, Topology

APPEAR_S: Final = 60.0
"""From a card's start until the lab's kernel has its management function."""
CONFIG: Final = "/etc/virtfabric/cards.toml"
HOST_ID: Final = "lab"
IMAGES: Final = ("crypto.aes", "compress.zstd")
_DAYS: Final = 30
_SIGNER: Final = ("signer.pem", "signer.pub")
_READY: Final = ": ready\n"
_READY_S: Final = 30.0
_LOOK_S: Final = 0.1
_END_S: Final = 10.0
_IMAGE: Final = 64 << 10
_DESCRIPTION: Final = """\
version = 1

[adapter]
serial = "{serial}"
cores = 8
memory = "256MiB"
lanes = 16
keys = 15
bandwidth = 100000
site = "node:{node}"

[adapter.accelerators]
"crypto.aes" = 2
"compress.zstd" = 2

[card]
socket = "{serial}.sock"
state = "{serial}.flash"
credentials = "{serial}.credentials"
signers = ["signer.pub"]
"""


@dataclass(frozen=True, slots=True)
class LabCard:
    """One card of a lab.

    Attributes:
        ports: of the lab's QEMU, that for its mailbox first.
        node: NUMA node of the lab that it is near.
    """

    place: Place
    serial: str
    ports: tuple[str, ...]
    node: int

    @property
    def directory(self) -> Path:
        """Of all cards of the lab."""
        return self.place.cards

    @property
    def description(self) -> Path:
        """What it is."""
        return self.directory / f"{self.serial}.toml"

    @property
    def credentials(self) -> Path:
        """Its certificate and key. No id has a dot: none is like what belongs to all cards."""
        return self.directory / f"{self.serial}.credentials"

    @property
    def log(self) -> Path:
        """What it says."""
        return self.directory / f"{self.serial}.log"

    @property
    def functions(self) -> Path:
        """Where its functions' sockets are."""
        return self.directory / f"{self.serial}.functions"

    @property
    def sockets(self) -> tuple[Path, ...]:
        """Its own, and the one of its functions that has the longest name."""
        return self.directory / f"{self.serial}.sock", self.functions / "management.sock"

    @property
    def flash(self) -> Path:
        """What it keeps."""
        return self.directory / f"{self.serial}.flash"

    def find_processes(self) -> list[int]:
        """Its process, if it runs."""
        return find_processes(_words(self.description))

    def start(self) -> None:
        """Power it on, and wait until it serves; its functions come to the lab by themselves.

        Raises:
            LabError: it runs already, or it ended at once; `log` is what it said.
        """
        if self.find_processes():
            raise LabError(f"card {self.serial} runs already")
        ports = [word for port in self.ports for word in ("--port", port)]
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", *_words(self.description)),
                    *("--functions", str(self.functions)),
                    *("--qmp", str(self.place.card_monitor(self.serial)), *ports),
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + _READY_S
        while _READY not in self.log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > until:
                process.kill()
                lines = self.log.read_text(errors="replace").splitlines()
                raise LabError(f"card {self.serial} did not start", log=lines[-10:])
            time.sleep(_LOOK_S)

    def kill(self) -> bool:
        """Have it die without a word. Whether it ran.

        For its functions in the lab's QEMU a process answers from then on, until they are out.
        """
        found = self.find_processes()
        for pid in found:
            clients = kill_process(
                pid,
                lambda path: path.startswith(f"{self.functions}/"),
                words=_words(self.description),
                patience_s=_END_S,
            )
            _leave_to_answer(clients)
        return bool(found)


def cards_of(topology: Topology, place: Place) -> tuple[LabCard, ...]:
    """The cards of a lab, in the topology's order."""
    bridges = {bridge.id: bridge.node or 0 for bridge in topology.bridges}
    nodes = {port.id: bridges.get(port.bridge or "", 0) for port in topology.ports}
    return tuple(_lab_card(card, place, nodes[card.management]) for card in topology.cards)


def _lab_card(card: Card, place: Place, node: int) -> LabCard:
    return LabCard(place, card.id, card.ports, node)


def provision_cards(cards: Sequence[LabCard]) -> None:
    """Make what cards and their host are: authority, credentials, descriptions, signed images.

    Raises:
        InvalidValueError: a file cannot be written.
    """
    # imported late: OpenSSL's binding takes a quarter of a second, and most labs have no card
    from virtfabric.protocol.imagefile import SUFFIX, format_manifest
    from virtfabric.protocol.messages import Role
    from virtfabric.trust.identity import Identity
    from virtfabric.trust.images import describe_image, make_signer, sign_image
    from virtfabric.trust.store import AuthorityStore, write_credentials, write_new

    if not cards:
        return
    root = cards[0].directory
    root.mkdir(mode=0o700)
    authority = AuthorityStore(root / "authority")
    now = datetime.datetime.now(datetime.UTC)
    host = Identity.of(Role.HOST, HOST_ID)
    who = [(host, host_files(cards[0].place)), *(
        (Identity.of(Role.CARD, card.serial), card.credentials) for card in cards
    )]  # fmt: skip
    for identity, directory in who:
        made = authority.issue("virtfabric lab", identity, now, days=_DAYS)
        write_credentials(directory, made)
    key, public = make_signer()
    for name, data in zip(_SIGNER, (key, public), strict=True):
        write_new(root / name, data)
    for capability in IMAGES:
        image = host_files(cards[0].place) / f"{capability}.img"
        data = f"virtfabric lab: {capability}\n".encode().ljust(_IMAGE, b"\0")
        write_new(image, data)
        manifest = describe_image(capability, capability, data, int(time.time()) + _DAYS * 86400)
        text = format_manifest(manifest, sign_image(key, manifest))
        write_new(image.with_name(image.name + SUFFIX), text.encode())
    for card in cards:
        text = _DESCRIPTION.format(serial=card.serial, node=card.node)
        card.description.write_text(text)


def host_files(place: Place) -> Path:
    """What a host in the lab needs: its credentials, and images."""
    return place.cards / "host"


def format_config(ways: dict[str, str]) -> str:
    """The agent's configuration.

    Args:
        ways: the PCI address of each card's mailbox, by serial.
    """
    lines = ["[cards]", 'credentials = "/opt/virtfabric/lab/cards"']
    for serial, address in ways.items():
        lines += ["", "[[cards.card]]", f'serial = "{serial}"', f'mailbox = "{address}"']
    return "\n".join(lines) + "\n"


def format_search(topology: Topology, port: str) -> str:
    """A shell command for the lab: prints the address of the function behind a port, once there."""
    seat = choose_seats(topology)[port]
    bus = next((bridge.bus for bridge in topology.bridges if bridge.id == seat.bus), 0)
    where = f"/sys/bus/pci/devices/0000:{bus:02x}:{seat.slot:02x}.{seat.function:x}/0000:??:??.?"
    return (
        f"end=$(($(date +%s) + {APPEAR_S:.0f})); until [ -e {where}/resource2 ]; do "
        '[ "$(date +%s)" -lt $end ] || exit 9; read -rt 0.2 <> <(:) || :; done; '
        f"cd {where} && basename $PWD"
    )


def end_cards(place: Place) -> None:
    """End all processes of cards of a lab, also where its topology is not known any more.

    Without a word: in order, a card would take its functions out of the lab's QEMU, which is gone.
    """
    for description in place.cards.glob("*.toml"):
        for pid in find_processes(_words(description)):
            kill_process(pid, words=_words(description), patience_s=_END_S)


def _words(description: Path) -> tuple[str, str]:
    """What a card's process is known by."""
    return "virtfabric.cli.cardd", str(description)


def _leave_to_answer(clients: Sequence[socket.socket]) -> None:
    """What was for a card that died is answered by a process of its own; it ends with QEMU's."""
    if not clients:
        return
    subprocess.Popen(
        [
            *(sys.executable, "-m", "virtfabric.shim.vfiouser.dead"),
            *(str(client.fileno()) for client in clients),
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, pass_fds=[client.fileno() for client in clients],
    )  # fmt: skip
    for client in clients:
        client.close()
