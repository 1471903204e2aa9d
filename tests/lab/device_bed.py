"""`DeviceBed`: the agent in the passthrough lab, guests with ports, and their functions.

What the agent says is not believed: sysfs, virsh and the guests' own consoles are asked.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from running_lab import RunningLab

DEVICES = "/sys/bus/pci/devices"
CONFIG = """\
[[device]]
capability = "net.vf"
match = { pf = "0000:01:00.0" }
vf_count = 2
vf = { trust = true, spoofchk = false }
[[device]]
capability = "net.vf"
match = { pf = "0000:51:00.0" }
vf_count = 2
[[device]]
capability = "storage.nvme"
match = { pf = "0000:52:00.0" }
vf_count = 2
nvme_queues = 2
[[device]]
capability = "compute.edu"
match = { ids = "1234:11e8" }
"""
FAULT_AGENT = "/opt/virtfabric/checkout/tests/integration/fault_agent.py"
_MEMORY_DEVICE = re.compile(r"<memory model=.*?</memory>", re.DOTALL)


@dataclass(frozen=True)
class Trace:
    """What must be the same before and after functions came and went.

    Of the journal: the books and what is open. Ended transactions stay, up to 10,000.
    """

    drivers: dict[str, str]
    groups: int
    agent_files: int
    libvirtd_files: int
    journal_rows: dict[str, int]


@dataclass(frozen=True)
class DeviceBed:
    """One lab with the agent in it."""

    lab: RunningLab

    # -- the agent ----------------------------------------------------------------------------

    def prepare(self) -> None:
        """The hook, the pools, the uplinks; libvirtd once more, so that it sees the hook."""
        self.lab.run(
            "cd /opt/virtfabric/checkout && virtfabric-python -m compileall -q virtfabric; "
            "virtfabric install > /dev/null 2>&1; kill -HUP $(cat /run/dbus/pid); "
            "ip link set eth1 up; ip link set eth2 up; old=$(pidof libvirtd); kill $old; "
            "while [ -d /proc/$old ]; do read -rt 0.2 <> <(:); done; libvirtd -d"
        )
        self.lab.run(f"cat > /etc/virtfabric/devices.toml <<'X'\n{CONFIG}X")
        self.lab.wait("virsh -q capabilities > /dev/null 2>&1", timeout_s=120)

    def start_agent(self, fault: str = "") -> None:
        """The agent, with a fault if one is named; returns when it serves."""
        program = f"virtfabric-python {FAULT_AGENT} {fault}" if fault else "virtfabricd"
        self.lab.run(f"setsid {program} >> /var/log/virtfabricd.log 2>&1 < /dev/null & disown")
        self.lab.wait("virtfabric status > /dev/null 2>&1; [ $? -ne 4 ]", timeout_s=300)

    def await_agents_end(self) -> None:
        """Until it has died."""
        self.lab.wait("! pgrep -f '[a]gentd|[f]ault_agent' > /dev/null", timeout_s=180)

    def ask(self, words: str, **options: Any) -> Any:
        """The document that `virtfabric WORDS --json` prints."""
        return self.lab.json(f"virtfabric {words} --json 2> /dev/null", timeout_s=400, **options)

    def refused(self, words: str, code: int = 3) -> str:
        """What `virtfabric WORDS` says when it is refused; code 2 where it makes no sense."""
        said = self.lab.run(f"virtfabric {words} 2>&1; echo code $?", timeout_s=400)
        assert said.endswith(f"code {code}"), said
        return said

    def allocate(self, guest: str, capability: str) -> str:
        """The grant of one function."""
        answer = self.ask(f"allocate {guest} --device {capability}")
        return str(answer["grant"] if "grant" in answer else answer["result"]["grant"])

    def release(self, grant: str) -> None:
        """End a grant."""
        self.ask(f"release {grant}")

    def cycle(self, guest: str, capability: str, rounds: int) -> None:
        """Grants and releases, one after the other."""
        script = "/opt/virtfabric/checkout/tests/lab/cycle.py"
        words = f"virtfabric-python {script} {guest} {capability} {rounds}"
        self.lab.run(f"{words} 2>&1", timeout_s=120 + 60 * rounds)

    def functions(self) -> dict[str, Any]:
        """By address, as `virtfabric devices` has them."""
        return {row["address"]: row for row in self.ask("devices")}

    def held_by(self, guest: str) -> list[str]:
        """Functions that the agent counts as this guest's."""
        return sorted(a for a, row in self.functions().items() if row["holder"] == guest)

    def quarantined(self) -> dict[str, str]:
        """Why, by address."""
        rows = self.functions().values()
        return {r["address"]: r["quarantine"]["why"] for r in rows if r["quarantine"]}

    # -- guests -------------------------------------------------------------------------------

    def define(self, name: str, priority: int, devices: str = "", more: str = "") -> None:
        """A guest with four root ports, a policy, and `devices` in it.

        It has one vCPU: with more an emulated host's guests fall over too often (docs/lab.md).
        """
        policy = (
            "<metadata><v:policy xmlns:v='urn:virtfabric:policy:1' version='1' "
            f"priority='{priority}'><v:cpu reservation='500m' limit='1'/>"
            f"<v:memory reservation='192MiB' limit='192MiB'/>{devices}</v:policy></metadata>"
        )
        xml = self.lab.run("cat /opt/virtfabric/lab/guest.xml")
        xml = xml.replace("<name>guest</name>", f"<name>{name}</name>{policy}{more}")
        xml = xml.replace("guest-console", f"{name}-console")
        xml = _MEMORY_DEVICE.sub("", xml)
        xml = re.sub(r"<maxMemory.*?</maxMemory>", "", xml)
        self.lab.run(f"virsh -q undefine {name} 2> /dev/null", code=None)
        self.lab.run(f"cat > /tmp/{name}.xml <<'X'\n{xml}\nX\nvirsh -q define /tmp/{name}.xml")

    def boot(self, name: str) -> None:
        """Start it and wait for its userland."""
        start = f"virsh -q start {name} 2>&1"
        self.lab.run(
            f"rm -f {console(name)}; said=$({start}) && exit; "
            # the agent was busy for longer than a hook may wait, and its hook says so
            f'case $said in *retry*) {start};; *) echo "$said"; exit 1;; esac',
            timeout_s=400,
        )
        self.lab.wait_for_guest(name)

    def stop(self, name: str) -> None:
        """Off, by force; QEMU may take long to let go of a function behind a dead link."""
        self.lab.run(f"virsh -q destroy {name}", timeout_s=200, code=None)
        self.lab.wait(f"! virsh -q list --name | grep -qx {name}", timeout_s=300)

    def await_told(self, guest: str, pattern: str, *, count: int = 1) -> str:
        """The last VFDEV line of this form on the guest's console, once there are so many."""
        found = f"grep -aE 'VFDEV {pattern}' {console(guest)}"
        self.lab.wait(f"[ $({found} | wc -l) -ge {count} ]", timeout_s=120)
        return self.lab.run(f"{found} | tail -n 1 | tr -d '\\r'")

    def hostdevs(self, guest: str) -> list[str]:
        """Functions in the guest's live XML."""
        root = ET.fromstring(self.lab.run(f"virsh -q dumpxml {guest}"))
        found = []
        for element in root.iterfind("devices/hostdev/source/address"):
            parts = [int(element.get(k, "0"), 16) for k in ("domain", "bus", "slot", "function")]
            found.append("{:04x}:{:02x}:{:02x}.{:x}".format(*parts))
        return sorted(found)

    def answers(self, guest: str, pf: str) -> None:
        """The guest's new NIC answers a ping that goes out through the PF."""
        mac = self.await_told(guest, "net").split()[-1]
        octets = [int(part, 16) for part in mac.split(":")]
        octets[0] ^= 2
        words = [*octets[:3], 0xFF, 0xFE, *octets[3:]]
        pairs = zip(words[::2], words[1::2], strict=True)
        address = "fe80::" + ":".join(f"{high << 8 | low:x}" for high, low in pairs)
        self.lab.wait(f"busybox ping -6 -c 1 -W 3 {address}%{pf} > /dev/null", timeout_s=90)

    # -- the host -----------------------------------------------------------------------------

    def driver(self, address: str) -> str:
        """Bound now; `none` for none."""
        return self.lab.run(f"basename $(readlink {DEVICES}/{address}/driver || echo none)")

    def override(self, address: str) -> str:
        """As the kernel shows it, `(null)` for none."""
        return self.lab.run(f"cat {DEVICES}/{address}/driver_override")

    def vf_shown(self, pf: str, number: int) -> dict[str, Any]:
        """What ip(8) tells of one VF, but for its MAC: a guest's driver sets that."""
        shown = self.lab.json(f"ip -j link show dev {pf}")[0]["vfinfo_list"][number]
        return {k: v for k, v in shown.items() if k != "address"}

    def assert_sound(self, *guests: str) -> None:
        """No function is lost, leaked or shared: books, live XML and drivers tell the same."""
        functions = self.functions()
        live = {guest: self.hostdevs(guest) for guest in guests}
        for guest, has in live.items():
            booked = [a for a, f in functions.items() if f["holder"] == guest]
            assert sorted(booked) == has, (guest, booked, has)
        attached = [address for has in live.values() for address in has]
        assert len(attached) == len(set(attached)), live
        for address, function in functions.items():
            if function["capability"] and not function["holder"] and not function["quarantine"]:
                assert function["driver"] in (None, "", "nvme"), function
                assert self.override(address) == "(null)", function

    def trace(self) -> Trace:
        """See `Trace`."""
        rows = self.lab.run(
            "virtfabric-python - <<'X'\n"
            "import sqlite3, json\n"
            "db = sqlite3.connect('file:/var/lib/virtfabric/journal.db?mode=ro', uri=True)\n"
            "named = db.execute('select name from sqlite_master where type=\"table\"').fetchall()\n"
            "tables = {name for (name,) in named} - {'txn', 'step'}\n"
            "tables.add('txn where state = \"open\"')\n"
            "def rows(table):\n"
            "    return db.execute(f'select count(*) from {table}').fetchone()[0]\n"
            "print(json.dumps({table: rows(table) for table in tables}))\n"
            "X"
        )
        drivers = self.lab.run(
            f"for f in {DEVICES}/*; do "
            "echo ${f##*/} $(basename $(readlink $f/driver || echo -)); done"
        )
        return Trace(
            drivers=dict(line.split() for line in drivers.splitlines()),
            groups=int(self.lab.run("ls /sys/kernel/iommu_groups | wc -l")),
            agent_files=int(
                self.lab.run("ls /proc/$(pgrep -f '[c]li.agentd' | head -n 1)/fd | wc -l")
            ),
            libvirtd_files=int(self.lab.run("ls /proc/$(pidof libvirtd)/fd | wc -l")),
            journal_rows=json.loads(rows),
        )


def console(guest: str) -> str:
    """Where libvirt writes the guest's console."""
    return f"/var/log/libvirt/qemu/{guest}-console.log"
