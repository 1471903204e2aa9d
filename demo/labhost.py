"""A nested lab as the stage of a demo or a benchmark: brought up, prepared, put back, taken down.

The product is driven from outside only: by `virtfabric lab`, and by `virtfabric`, `virtfabricd`
and `virsh` in the lab. It judges nothing.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from demo.devicechecker import Sight
from demo.memorychecker import MemorySight

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "virtfabric.cli.main", "lab")
CHECKOUT = "/opt/virtfabric/checkout"
CONFIG = "/etc/virtfabric/passthrough.toml"
AGENT_LOG = "/var/log/virtfabricd.log"
CONSOLES = "/var/log/libvirt/qemu"
INTERVALS = """\
[agent]
sample_interval_s = 10
drift_interval_s = 300

"""
"""An emulated host is some twelve times slower: at the default ones it would do little else."""
_UP_S = 1800.0
_STEP_S = 600.0


class LabError(Exception):
    """The lab cannot be brought up, or a command that has to succeed there failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabGuest:
    """A guest in the lab, of one vCPU: more fall over too often there (docs/lab.md).

    Attributes:
        devices: its policy's `<device>`: capability -> count, all reclaimable.
        tiered: whether it may have CXL memory of node 1, see `format_tiered`.
        virtio_mem_mib: size of its own virtio-mem device.
        touched_mib: of memory that is plugged in, what it writes to and then tells of.
    """

    name: str
    priority: int
    devices: tuple[tuple[str, int], ...] = ()
    tiered: bool = False
    virtio_mem_mib: int = 256
    touched_mib: int | None = None

    @property
    def policy_xml(self) -> str:
        """Its `<virtfabric:policy>`."""
        devices = "".join(
            f'<device capability="{capability}" count="{count}" reclaimable="yes"/>'
            for capability, count in self.devices
        )
        tiers = ' tiers="dram,cxl"' if self.tiered else ""
        return (
            '<virtfabric:policy xmlns:virtfabric="urn:virtfabric:policy:1" version="1"'
            f' priority="{self.priority}"><cpu reservation="1" limit="1"/>'
            f'<memory reservation="192MiB"{tiers}/>{devices}</virtfabric:policy>'
        )


def format_tiered(domain_xml: str) -> str:
    """A domain of the lab, made ready for CXL memory: strict, all of it on node 0, room for more.

    It may have memory on node 1: libvirt holds QEMU to the nodes that were named at its start.

    Raises:
        LabError: it is not of the form that the lab's guests have.
    """
    for found, better in _TIERED:
        domain_xml, count = re.subn(found, better, domain_xml)
        if count != 1:
            raise LabError(f"the lab's guest has {count} of {found}")
    return domain_xml


_TIERED: Final = (
    (r"<maxMemory [^>]*>\d+<", "<maxMemory slots='4' unit='MiB'>2048<"),
    (
        r"</vcpu>",
        "</vcpu>\n  <numatune><memory mode='strict' nodeset='0-1'/>"
        "<memnode cellid='0' mode='strict' nodeset='0'/></numatune>",
    ),
    (
        r"<memory model='virtio-mem'>",
        "<memory model='virtio-mem'>\n      <source><nodemask>0</nodemask></source>",
    ),
)


class LabHost:
    """A lab by name; `start` leaves one alone that is up already, and `stop` does then, too."""

    def __init__(self, name: str, topology: str) -> None:
        """Nothing is touched before `start`."""
        self.name = name
        self.topology = topology
        self.ours = False
        self.guests: list[LabGuest] = []

    # -- life -------------------------------------------------------------------------------------

    def start(self) -> str:
        """Bring the lab up; what it said.

        Raises:
            LabError: it did not come up, or an agent runs in it already.
        """
        listed = json.loads(self.lab("list", "--json").stdout)
        there = [lab for lab in listed["labs"] if lab["name"] == self.name]
        if there and there[0]["state"] == "ready":
            if self.run("pidof -x virtfabricd || pgrep -f '[v]irtfabric.cli.agentd'").stdout:
                raise LabError(f"an agent runs in lab {self.name} already: end it there first")
            return f"lab {self.name} is up already"
        self.ours = True
        done = self.lab("up", self.topology, "--name", self.name, timeout_s=_UP_S)
        if done.returncode:
            raise LabError(f"virtfabric lab up {self.topology}: {done.stdout}{done.stderr}")
        return done.stderr + done.stdout

    def stop(self) -> None:
        """Take the lab down, if `start` brought it up."""
        if self.ours:
            self.lab("down", self.name)

    def find_faults(self) -> list[str]:
        """What has hung or fallen over in a lab of ours by no doing of what runs there."""
        if not self.ours:
            return []
        done = self.lab("status", self.name, "--probe", "--json")
        return list(json.loads(done.stdout)["faults"]) if not done.returncode else []

    def lab(self, *words: str, timeout_s: float = _STEP_S) -> subprocess.CompletedProcess[str]:
        """A `virtfabric lab` command, whatever comes of it."""
        return subprocess.run(
            [*COMMAND, *words], capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip

    # -- commands in the lab ----------------------------------------------------------------------

    def run(self, command: str, *, timeout_s: float = _STEP_S) -> subprocess.CompletedProcess[str]:
        """A shell command in the lab, whatever comes of it."""
        return self.lab("run", self.name, command, timeout_s=timeout_s)

    def do(self, command: str, *, timeout_s: float = _STEP_S) -> str:
        """What a command prints that has to succeed.

        Raises:
            LabError: it failed.
        """
        done = self.run(command, timeout_s=timeout_s)
        if done.returncode:
            raise LabError(f"in the lab: {command}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def wait(self, condition: str, what: str, *, timeout_s: float = 300.0) -> None:
        """Wait in the lab until a shell condition holds (looked at five times a second).

        Raises:
            LabError: it did not hold in time.
        """
        loop = (
            f"end=$(( $(date +%s) + {timeout_s:.0f} )); until {condition}; do "
            '[ "$(date +%s)" -lt $end ] || exit 9; read -rt 0.2 <> <(:) || :; done'
        )
        if self.run(loop, timeout_s=timeout_s + 60).returncode:
            raise LabError(f"not within {timeout_s:.0f} s: {what}")

    def write(self, place: str, text: str) -> None:
        """A file in the lab."""
        self.do(f"mkdir -p {Path(place).parent} && printf %s {shlex.quote(text)} > {place}")

    # -- the host ---------------------------------------------------------------------------------

    def install(self, config: str) -> None:
        """Hook, bus policy, configuration; libvirtd again: it looks for hooks at its start."""
        self.do("virtfabric install > /dev/null && kill -HUP $(cat /run/dbus/pid)")
        self.write(CONFIG, INTERVALS + config)
        self.restart_libvirtd()

    def restart_libvirtd(self) -> None:
        """Guests run on; it looks for hooks and NUMA nodes at its start."""
        self.do("kill $(pidof libvirtd)")
        self.wait("! pidof libvirtd > /dev/null", "libvirtd ends")
        self.do("libvirtd -d")
        self.wait("virsh -q uri > /dev/null 2>&1", "libvirtd answers")

    def start_agent(self) -> None:
        """`virtfabricd`, until it is ready."""
        self.do(f"setsid virtfabricd > {AGENT_LOG} 2>&1 < /dev/null & disown")
        # asked by its log: each start of a client takes an emulated host seconds
        self.wait(f"grep -qs 'virtfabricd: ready' {AGENT_LOG}", "the agent is ready")

    def stop_agent(self) -> None:
        """SIGTERM, until it is gone."""
        self.run("kill $(pgrep -f '[v]irtfabric.cli.agentd')")
        self.wait("! pgrep -f '[v]irtfabric.cli.agentd' > /dev/null", "the agent ends")

    def start_guest(self, guest: LabGuest) -> subprocess.CompletedProcess[str]:
        """Define a guest and start it by virsh, so that libvirt's hook asks the agent.

        The hook waits 5 s for it; in a slow lab that may be too short, and it says "retry".
        """
        place = f"/root/{guest.name}.xml"
        self.write(place, self.format_guest(guest))
        self.do(f"virsh -q define {place}")
        self.guests.append(guest)
        done = self.run(f"virsh start {guest.name}")
        for _ in range(3):
            if not done.returncode or "retry" not in done.stderr:
                break
            done = self.run(f"virsh start {guest.name}")
        return done

    def format_guest(self, guest: LabGuest) -> str:
        """A guest's domain XML."""
        # the shim imports what plain users of the other methods need not have installed
        from virtfabric.shim.lab.payload import format_sample_guest

        xml = format_sample_guest(
            guest.name, metadata_xml=guest.policy_xml, virtio_mem_mib=guest.virtio_mem_mib,
            touched_mib=guest.touched_mib,
        )  # fmt: skip
        return format_tiered(xml) if guest.tiered else xml

    def wait_ready(self, guest: LabGuest) -> None:
        """Until the guest's userland takes hot-plug."""
        console = f"{CONSOLES}/{guest.name}-console.log"
        up = f"grep -qs VFREADY {console}"
        ended = f"[ ! -e /run/libvirt/qemu/{guest.name}.pid ]"
        self.wait(f"{{ {up} || {ended}; }}", f"{guest.name} is up", timeout_s=420)
        self.do(f"{up} || {{ echo {guest.name} fell over in its boot; exit 7; }}")

    def end_guests(self) -> None:
        """Destroy and undefine those that were started here."""
        for guest in self.guests:
            self.run(f"virsh -q destroy {guest.name}")
            self.run(
                f"virsh -q undefine {guest.name}; "
                f"rm -f /root/{guest.name}.xml {CONSOLES}/{guest.name}-console.log"
            )

    def clean(self) -> None:
        """Take away what `install` and the agent put there; the lab is as before."""
        self.run(f"virtfabric uninstall > /dev/null; rm -rf {CONFIG} /var/lib/virtfabric")

    def look(self, functions: tuple[str, ...], uplink: str) -> Sight:
        """What the lab's kernel, libvirt and guests show now."""
        asked = {
            "functions": functions, "guests": [guest.name for guest in self.guests],
            "uplink": uplink,
        }  # fmt: skip
        return Sight.from_json(self.see("devicesight", asked))

    def look_at_memory(self) -> MemorySight:
        """What the lab's kernel, libvirt, `cxl`, `daxctl` and guests show of memory now."""
        asked = {"guests": [guest.name for guest in self.guests]}
        return MemorySight.from_json(self.see("memorysight", asked))

    def see(self, script: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What one of the scripts that look at the lab printed."""
        words = shlex.quote(json.dumps(asked))
        seen: dict[str, Any] = json.loads(
            self.do(f"python3 -I {CHECKOUT}/demo/{script}.py {words}")
        )
        return seen

    def cli_json(self, words: str) -> Any:
        """What `virtfabric WORDS --json` prints."""
        return json.loads(self.do(f"virtfabric {words} --json"))
