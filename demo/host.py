"""A private host with libvirtd, bus, hooks, guests and the agent as a process of its own.

Owns set-up and teardown; the demo and the integration tests share it. The product is driven from
outside only: through `virtfabricd`, `virtfabric` and `virsh`, run inside the sandbox. It judges
nothing (`checker` does) and leaves nothing when it stops.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from demo import checker
from virtfabric.shim.guestimage import CMDLINE, ensure_guest_image
from virtfabric.shim.guestxml import GuestSpec, format_guest_xml
from virtfabric.shim.kvmprobe import choose_domain_type
from virtfabric.shim.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[1]
MIB = checker.MIB
AGENT = (sys.executable, "-m", "virtfabric.cli.agentd")
CLIENT = (sys.executable, "-m", "virtfabric.cli.main")
CONFIG = "/etc/virtfabric/demo.toml"
_CONSOLES = "/var/log/libvirt"
_START_S = 60.0


class HostError(Exception):
    """The private host cannot be set up or driven; the message ends with the log that tells why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A guest of a scenario, and the policy it carries in its metadata. Memory in MiB.

    Attributes:
        plugged: of `virtio_mem`, from the start; the guest then has `memory` + `plugged`.
        virtio_mem: size of the device; None makes it a balloon guest.
        cpu, reserve: the policy's CPU and memory, `RESERVATION:LIMIT` and a size; no policy
            element at all when `priority` is None.
        nodes: NUMA nodes of its memory, which the agent may move within them; None: anywhere.
        kernel_words: more of its kernel's command line.
    """

    name: str
    priority: int | None = 50
    cpu: str = "500m:1"
    reserve: int = 160
    vcpus: int = 1
    max_vcpus: int = 2
    memory: int = 160
    virtio_mem: int | None = 256
    plugged: int = 0
    placement: str = "shared"
    admission: str = "lax"
    drift: str = "report"
    shares: int = 100
    nodes: str | None = None
    kernel_words: str = ""

    @property
    def policy_xml(self) -> str:
        """Its `<virtfabric:policy>`; "" for an unmanaged guest."""
        if self.priority is None:
            return ""
        reservation, _, limit = self.cpu.partition(":")
        upper = f' limit="{limit}"' if limit else ""
        return (
            '<virtfabric:policy xmlns:virtfabric="urn:virtfabric:policy:1" version="1"'
            f' priority="{self.priority}" admission="{self.admission}" drift="{self.drift}">'
            f'<cpu reservation="{reservation}"{upper} shares="{self.shares}"'
            f' placement="{self.placement}"/>'
            f'<memory reservation="{self.reserve}MiB"/></virtfabric:policy>'
        )


def format_config(settings: Mapping[str, Mapping[str, object]]) -> str:
    """TOML of one level of tables; values are text, numbers or booleans."""
    tables = (
        f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in body.items())
        for table, body in settings.items()
    )
    return "\n".join(tables)


class Host:
    """`with Host("demo") as host:` is a running private host with libvirtd, without an agent."""

    def __init__(
        self,
        name: str,
        root: Path | None = None,
        *,
        agent_command: Sequence[str] = AGENT,
        keep: bool = False,
    ) -> None:
        """Describes a host; nothing is touched before `start`.

        Args:
            name: unique on this machine.
            root: directory for logs, None for a temporary one; removed at the end unless `keep`.
            agent_command: what to start in place of `virtfabricd`; its arguments are added.
            keep: leave the directory with the logs there.
        """
        self.root = root or Path(tempfile.mkdtemp(prefix=f"virtfabric-{name}-"))
        self._keep = keep
        self.box = Sandbox(name, self.root / "box")
        self.agent_command = tuple(agent_command)
        self.agent_log = self.root / "agent.log"
        self.agent: subprocess.Popen[str] | None = None
        self.guests: dict[str, Guest] = {}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        # COLUMNS: tables come through a pipe here, which has no width of its own.
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "COLUMNS": "100",
            "PYTHONUNBUFFERED": "1",
        }

    # -- life -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Brings up sandbox, bus, hooks, bus policy and libvirtd."""
        try:
            self.box.start()
            self.install()
            self.box.start_libvirtd()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends everything; may be repeated."""
        self.box.stop()
        self.agent = None
        if not self._keep:
            shutil.rmtree(self.root, ignore_errors=True)

    def install(self) -> None:
        """Puts the product's own hook and bus policy in place, inside the sandbox only.

        /usr is the machine's own here, so the vendor files go to a scratch root, and the bus
        policy from there to where an administrator would put one.

        Raises:
            HostError: a command failed.
        """
        scratch = self.root / "vendor"
        for words in (("hooks", "install"), ("install", "--root", str(scratch))):
            done = self.cli(*words)
            if done.returncode:
                raise HostError(f"virtfabric {' '.join(words)}: {done.stdout}{done.stderr}")
        name = "org.virtfabric1.conf"
        policy = (scratch / "usr/share/dbus-1/system.d" / name).read_text()
        self.box.path(f"/etc/dbus-1/system.d/{name}").write_text(policy)
        self.box.reload_bus()

    # -- agent ------------------------------------------------------------------------------------

    def write_config(self, settings: Mapping[str, Mapping[str, object]]) -> str:
        """Writes the agent's configuration; answers the text."""
        text = format_config(settings)
        path = self.box.path(CONFIG)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return text

    def start_agent(self, *, wait: bool = True, timeout_s: float = _START_S) -> None:
        """Starts the agent and waits until it answers on the bus.

        Raises:
            HostError: it ended or did not answer in time; the message has its log.
        """
        with self.agent_log.open("a") as log:
            self.agent = self.box.popen(
                [*self.agent_command, "--config", CONFIG],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if wait:
            self.wait_agent(timeout_s=timeout_s)

    def wait_agent(self, *, timeout_s: float = _START_S) -> None:
        """Waits until the agent owns its name on the bus.

        Raises:
            HostError: it ended or did not answer in time.
        """

        def answers() -> bool:
            if self.agent is None or self.agent.poll() is not None:
                raise HostError(f"the agent ended\n{self.read_agent_log()}")
            return self.has_bus_name()

        if not checker.wait_until(answers, timeout_s):
            raise HostError(f"the agent does not answer\n{self.read_agent_log()}")

    def has_bus_name(self) -> bool:
        """Whether somebody owns org.virtfabric1 on the sandbox's bus."""
        bus = "org.freedesktop.DBus"
        ask = ["dbus-send", "--system", "--print-reply=literal", f"--dest={bus}", "/"]
        done = self.box.run([*ask, f"{bus}.NameHasOwner", "string:org.virtfabric1"], check=False)
        return "true" in done.stdout

    def kill_agent(self, number: signal.Signals = signal.SIGKILL, *, timeout_s: float = 30) -> int:
        """Sends the agent a signal and waits for its end; answers its exit status."""
        if self.agent is None:
            raise HostError("there is no agent")
        self.agent.send_signal(number)
        code = self.agent.wait(timeout_s * checker.PATIENCE)
        self.agent = None
        return code

    def read_agent_log(self, lines: int = 30) -> str:
        """The last lines of the agent's log."""
        if not self.agent_log.exists():
            return "(the agent has no log)"
        return "\n".join(self.agent_log.read_text(errors="replace").splitlines()[-lines:])

    # -- commands ---------------------------------------------------------------------------------

    def cli(self, *words: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs `virtfabric WORDS` inside."""
        return self.box.run([*CLIENT, *words], check=False, timeout_s=timeout_s, env=self.env)

    def start_cli(self, *words: str) -> subprocess.Popen[str]:
        """Starts `virtfabric WORDS` inside and does not wait."""
        pipe = subprocess.PIPE
        return self.box.popen(
            [*CLIENT, *words], env=self.env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )

    def cli_json(self, *words: str) -> Any:
        """The document that `virtfabric WORDS --json` prints.

        Raises:
            HostError: it failed.
        """
        done = self.cli(*words, "--json")
        if done.returncode:
            said = f"{done.stdout}{done.stderr}"
            raise HostError(f"virtfabric {' '.join(words)} ended with {done.returncode}:\n{said}")
        return json.loads(done.stdout)

    def virsh(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `virsh WORDS` inside.

        Raises:
            SandboxError: with `check`, it failed.
        """
        return self.box.run(["virsh", "-c", "qemu:///system", *words], check=check)

    # -- guests -----------------------------------------------------------------------------------

    def console(self, name: str) -> Path:
        """Where this host sees the guest's console log."""
        return self.box.path(f"{_CONSOLES}/{name}.log")

    @property
    def unplugs(self) -> bool:
        """Whether a vCPU leaves its guest when it is asked to: with KVM only."""
        return choose_domain_type(ensure_guest_image()) == "kvm"

    def define(self, guest: Guest) -> None:
        """Writes and defines a guest."""
        image = ensure_guest_image()
        spec = GuestSpec(
            name=guest.name,
            domain_type=choose_domain_type(image),
            kernel=image.kernel,
            initrd=image.initrd,
            cmdline=f"{CMDLINE} {guest.kernel_words}".rstrip(),
            vcpus=guest.vcpus,
            max_vcpus=guest.max_vcpus,
            memory_mib=guest.memory,
            virtio_mem_mib=guest.virtio_mem,
            virtio_mem_requested_mib=guest.plugged,
            console_log=f"{_CONSOLES}/{guest.name}.log",
            numatune_mode="restrictive" if guest.nodes else None,
            numatune_nodeset=guest.nodes or "",
            metadata_xml=guest.policy_xml,
        )
        path = self.box.root / f"{guest.name}.xml"
        path.write_text(format_guest_xml(spec))
        self.virsh("define", str(path))
        self.guests[guest.name] = guest

    def start_guest(self, name: str) -> subprocess.CompletedProcess[str]:
        """`virsh start`; what it says is the caller's to judge."""
        return self.virsh("start", name, check=False)

    def wait_ready(self, *names: str, timeout_s: float = 90) -> None:
        """Waits until these guests (all when none is named) report about themselves.

        Raises:
            HostError: one of them did not, or it ended; the message has the end of its console.
        """

        def ready() -> bool:
            silent = [n for n in names or self.guests if not checker.read_report(self.console(n))]
            for name in silent:
                self.must_run(name)
            return not silent

        self.wait(ready, "the guests are up", timeout_s=timeout_s)

    def must_run(self, name: str) -> None:
        """Looks whether a guest has ended.

        Raises:
            HostError: it has; with the end of its console.
        """
        try:
            checker.find_qemu(self.place, name)
        except checker.CheckerError as error:
            console = self.console(name).read_text(errors="replace").splitlines()[-15:]
            raise HostError("\n".join([f"guest {name} has ended", *console])) from error

    # -- looking ----------------------------------------------------------------------------------

    @property
    def place(self) -> checker.Place:
        """Where the checker finds the guests."""
        return checker.enter_namespaces(self.box.pid)

    def observe(self, name: str, *, fresh: bool = False) -> checker.Observation:
        """One guest, by the checker; with `fresh`, after the guest has spoken again."""
        if fresh:
            checker.wait_for_news([self.console(name)])
        return checker.observe(self.place, name, self.console(name))

    def observe_all(self, *, fresh: bool = False) -> dict[str, checker.Observation]:
        """Every guest that was defined here, by name."""
        if fresh:
            checker.wait_for_news([self.console(name) for name in self.guests])
        return {name: self.observe(name) for name in self.guests}

    def wait(self, condition: Callable[[], bool], what: str, *, timeout_s: float = 30) -> float:
        """Waits for a condition; answers how many seconds it took.

        Raises:
            HostError: it did not hold in time.
        """
        began = time.monotonic()
        if not checker.wait_until(condition, timeout_s):
            raise HostError(f"{what}: not within {timeout_s:g} s\n{self.read_agent_log()}")
        return time.monotonic() - began
