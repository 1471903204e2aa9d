"""The outer QEMU's command line: what any lab has, around what its topology says. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from virtfabric.shim.lab.recipe import CMDLINE
from virtfabric.shim.topology.arguments import qemu_arguments
from virtfabric.shim.topology.kernel import kernel_arguments

if TYPE_CHECKING:
    from pathlib import Path

    from virtfabric.shim.lab.image import LabImage
    from virtfabric.shim.lab.place import Place
    from virtfabric.shim.topology.model import Topology

Accel = Literal["kvm", "tcg", "tcg with one thread"]
_ACCELS: Final[dict[Accel, str]] = {
    "kvm": "kvm,kernel-irqchip=split",
    "tcg": "tcg,thread=multi",
    "tcg with one thread": "tcg,thread=single",
}


def format_arguments(
    topology: Topology, image: LabImage, place: Place, *, accel: Accel, port: int, epoch: int
) -> tuple[str, ...]:
    """Everything after the program's name.

    Args:
        topology: checked.
        image: what it boots from.
        place: where its sockets and logs go.
        accel: TCG emulates AMD's SVM, so guests of the lab are KVM guests either way.
        port: on 127.0.0.1, forwarded to the lab's sshd; nothing else goes in or out.
        epoch: the time the lab's clock starts at, in seconds.
    """
    own = (f"vflab.name={place.name}", f"vflab.epoch={epoch}")
    return (
        *("-name", f"virtfabric-lab-{place.name}", "-nodefaults", "-display", "none"),
        *("-pidfile", str(place.pid_file), "-no-reboot", "-accel", _ACCELS[accel]),
        *("-d", "cpu_reset", "-D", str(place.cpu_log)),
        # hypervisor=off: the CXL driver commits no region in a guest that sees a hypervisor
        *("-cpu", "host,hypervisor=off" if accel == "kvm" else "max,hypervisor=off"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", " ".join((CMDLINE, *kernel_arguments(topology), *own))),
        *qemu_arguments(topology, place.directory),
        *_format_disk("root", image.disk),
        *_format_disk("payload", place.payload),
        *("-netdev", f"user,id=way,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"),
        *("-device", "virtio-net-pci,netdev=way,bus=pcie.0"),
        *("-device", "virtio-rng-pci,bus=pcie.0"),
        *("-chardev", _format_console(place), "-serial", "chardev:console"),
        *_format_monitor(place.monitor_socket),
        *(w for card in topology.cards for w in _format_monitor(place.card_monitor(card.id))),
    )


def _format_monitor(socket: Path) -> tuple[str, str]:
    return ("-qmp", f"unix:{_escape(socket)},server=on,wait=off")


def _format_disk(name: str, file: Path) -> tuple[str, ...]:
    drive = f"file={_escape(file)},snapshot=on,if=none,id={name},format=raw,cache=unsafe"
    return ("-drive", drive, "-device", f"virtio-blk-pci,drive={name},serial={name},bus=pcie.0")


def _format_console(place: Place) -> str:
    return (
        f"socket,id=console,path={_escape(place.console_socket)},server=on,wait=off,"
        f"logfile={_escape(place.console_log)}"
    )


def _escape(path: Path) -> str:
    """QEMU ends a value at a comma; two stand for one."""
    return str(path).replace(",", ",,")
