"""Domain XML of test and demo guests: a `GuestSpec` in, text out, through `domain.xml.j2`.

Pure apart from reading the template. Guests of users are never written here: their XML is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as ET

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from virtfabric.resources import xml_template_dir
from virtfabric.shim.guestimage import CMDLINE

if TYPE_CHECKING:
    from pathlib import Path

DomainType = Literal["qemu", "kvm"]
_CPU_MODE: dict[DomainType, str] = {"qemu": "maximum", "kvm": "host-passthrough"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """A guest of the shim.

    Attributes:
        name: its libvirt name.
        kernel: see `guestimage.GuestImage`; so is `initrd`.
        console_log: where libvirt writes the serial console; its directory must exist inside.
        domain_type: "kvm" only where `kvmprobe` says that it runs guests.
        vcpus: at start; `max_vcpus` is what hot-plug can reach.
        memory_mib: boot memory. 160 is enough for the shim's image.
        virtio_mem_mib: size of the virtio-mem device, a multiple of 2; the guest sees it in steps
            of 128 (a kernel memory section). None makes it a balloon guest instead.
        virtio_mem_requested_mib: what of that device is plugged from the start.
        numatune_mode: None leaves the host's memory policy.
        metadata_xml: one element with its own xmlns, e.g. a virtfabric:policy; "" for none.
        cmdline: the kernel's arguments.
        root_ports: free PCIe ports for devices that come later.
    """

    name: str
    kernel: Path
    initrd: Path
    console_log: str
    uuid: str | None = None
    domain_type: DomainType = "qemu"
    vcpus: int = 1
    max_vcpus: int = 2
    memory_mib: int = 192
    virtio_mem_mib: int | None = None
    virtio_mem_requested_mib: int = 0
    numatune_mode: Literal["strict", "restrictive", "preferred", "interleave"] | None = None
    numatune_nodeset: str = "0"
    metadata_xml: str = ""
    cmdline: str = CMDLINE
    root_ports: int = 4
    emulator: str = "/usr/bin/qemu-system-x86_64"


def format_guest_xml(guest: GuestSpec) -> str:
    """The domain XML of `guest`, ready for `virsh create` or `define`.

    Raises:
        ValueError: the counts of vCPUs contradict each other, or `metadata_xml` is not one
            well-formed element.
    """
    if not 1 <= guest.vcpus <= guest.max_vcpus:
        raise ValueError(f"vcpus {guest.vcpus} is not within 1 to max_vcpus {guest.max_vcpus}")
    if guest.metadata_xml:
        _check_element(guest.metadata_xml)
    environment = Environment(
        loader=FileSystemLoader(xml_template_dir()),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("domain.xml.j2").render(
        guest=guest,
        cpu_mode=_CPU_MODE[guest.domain_type],
        metadata=Markup(guest.metadata_xml),  # checked above to be an element
    )


def _check_element(text: str) -> None:
    try:
        ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"metadata_xml is not one XML element: {error}: {text[:80]}") from error
