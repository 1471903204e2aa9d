"""What `vagrant/Vagrantfile` reads: the box, and the machine of one topology, as one JSON file.

Owns bringing together what vagrant needs before it starts. `vagrant/build-box` runs it:

    python -m virtfabric.shim.lab.vagrantbox [TOPOLOGY] [--settings FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.model.errors import VirtfabricError
from virtfabric.shim.cache import BuildError
from virtfabric.shim.guestimage import ensure_guest_image
from virtfabric.shim.kvmprobe import choose_domain_type
from virtfabric.shim.lab.box import ensure_box
from virtfabric.shim.lab.outer import choose_outer
from virtfabric.shim.lab.recipe import CMDLINE
from virtfabric.shim.lab.vagrantdisks import choose_state, read_qemu_user, write_backing_files
from virtfabric.shim.topology.kernel import kernel_arguments
from virtfabric.shim.topology.needs import device_needs, needs_tcg
from virtfabric.shim.topology.shipped import read_topology
from virtfabric.shim.topology.vagrant import check_for_vagrant, format_vagrant_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtfabric.shim.guestxml import DomainType
    from virtfabric.shim.lab.box import Box
    from virtfabric.shim.topology.model import Topology

DRIVERS: Final[dict[DomainType, dict[str, Any]]] = {
    "qemu": {"cpu_mode": "maximum", "qemuargs": ["-cpu", "max,hypervisor=off"]},
    "kvm": {
        "cpu_mode": "host-passthrough",
        # an IOMMU that remaps interrupts needs the split irqchip
        "qemuargs": ["-cpu", "host,hypervisor=off", "-machine", "kernel-irqchip=split"],
    },
}
"""What the Vagrantfile sets for each driver.

hypervisor=off: the CXL driver commits no region in a guest that sees a hypervisor. vagrant-libvirt
(0.11) takes CPU features only with a named model; of several `-cpu` QEMU takes the last.
"""


def format_settings(
    topology: Topology, box: Box, *, default_driver: DomainType, emulator: Path, state: Path
) -> str:
    """All that the Vagrantfile has to know of one lab, as a JSON object.

    `provider` is `format_vagrant_settings`; `drivers` are those that can carry the topology, each
    with what it wants set, `driver` the one to take unless told otherwise.
    """
    drivers = {name: value for name, value in DRIVERS.items() if not _refuses(topology, name)}
    settings = {
        "box": {key: str(value) for key, value in asdict(box).items()},
        "cmdline": " ".join((CMDLINE, *kernel_arguments(topology))),
        "driver": default_driver if default_driver in drivers else "qemu",
        "drivers": drivers,
        "emulator": str(emulator),
        "state": str(state),
        "provider": json.loads(format_vagrant_settings(topology, state)),
    }
    return json.dumps(settings, indent=1) + "\n"


def _refuses(topology: Topology, driver: DomainType) -> bool:
    return driver == "kvm" and needs_tcg(topology)


def prepare(text: str, settings: Path | None, report: Callable[[str], None]) -> Box:
    """Build what is missing for a topology (by name or file) and write its settings.

    Raises:
        BuildError: something cannot be built here.
        InvalidValueError: there is no such topology, or it is wrong, or nothing for Vagrant.
    """
    title, topology = read_topology(text)
    check_for_vagrant(topology)
    # libvirt starts TCG with a thread for each vCPU, and offers no choice
    several = topology.cpu.max_vcpus > 1
    emulator = choose_outer(device_needs(topology), report, threads=several).ensure_emulator()
    box = ensure_box(report)
    if settings:
        state = choose_state(title, settings)
        write_backing_files(topology, state, read_qemu_user())
        driver = choose_domain_type(ensure_guest_image(report=report))
        written = format_settings(
            topology, box, default_driver=driver, emulator=emulator, state=state
        )
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(written)
    return box


def main(argv: Sequence[str] | None = None) -> int:
    """Prints where the box is; progress and errors go to stderr."""
    parser = argparse.ArgumentParser(prog="build-box", description=__doc__.splitlines()[0])
    parser.add_argument("topology", nargs="?", default="small", help="name or file (%(default)s)")
    parser.add_argument("--settings", type=Path, metavar="FILE", help="what a Vagrantfile reads")
    args = parser.parse_args(argv)
    since = time.monotonic()

    def report(line: str) -> None:
        sys.stderr.write(f"{time.monotonic() - since:6.1f} s  {line}\n")

    try:
        box = prepare(args.topology, args.settings, report)
    except VirtfabricError as error:
        log = error.log if isinstance(error, BuildError) else ()
        sys.stderr.write("\n".join([f"build-box: {error}", *log, error.advice]).rstrip() + "\n")
        return 1
    sys.stdout.write(f"{box.package}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
