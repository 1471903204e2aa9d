"""`RunningLab`: a lab that a test looks at, and the command that brings it up and down."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = (sys.executable, "-m", "virtfabric.cli.main", "lab")
UP_S = 900  # with an empty cache; some 30 s with a full one
BOOT_S = 300  # a guest in a lab; 15 to 30 s on a quiet machine
# as in tests/integration/guest_health.py
SILENT_S = 90
STUCK = re.compile(r"soft lockup - CPU#\d+ stuck for (\d+)s")


def lab_command(*words: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    """`virtfabric lab WORDS`."""
    return subprocess.run(
        [*COMMAND, *words], capture_output=True, text=True, timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


@dataclass(frozen=True)
class RunningLab:
    """One lab, as its users see it."""

    name: str
    faults: list[str] = field(default_factory=list, compare=False)
    """What a test has found by itself of what `find_faults` tells."""

    def run(self, command: str, *, timeout_s: float = 180, code: int | None = 0) -> str:
        """What a shell command in the lab prints; asserts its exit code unless `code` is None."""
        done = lab_command("run", self.name, command, timeout_s=timeout_s)
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout.strip()

    def follow(self, command: str, *, look_s: float = 600) -> Iterator[str]:
        """Lines of a long command in the lab, as they come.

        After each `look_s` of silence the lab is looked at: nobody waits for one that hangs.

        Raises:
            AssertionError: it does.
        """
        with subprocess.Popen(
            [*COMMAND, "run", self.name, command], bufsize=0,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            process_group=0,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            part = b""
            try:
                # no read that blocks: the lab's ssh keeps the pipe until the command there ends
                while data := self._read(process.stdout.fileno(), look_s):
                    *lines, part = (part + data).split(b"\n")
                    yield from (line.decode(errors="replace") for line in lines)
                if part:
                    yield part.decode(errors="replace")
            finally:
                os.killpg(process.pid, signal.SIGKILL)  # and its ssh

    def _read(self, pipe: int, look_s: float) -> bytes:
        while not select.select([pipe], [], [], look_s)[0]:
            faults = self.find_faults()
            assert not faults, faults
        return os.read(pipe, 1 << 16)

    def json(self, command: str, **options: Any) -> Any:
        """The JSON that a command in the lab prints."""
        return json.loads(self.run(command, **options))

    def wait(self, command: str, *, timeout_s: float = 60) -> str:
        """Wait in the lab until a shell condition holds (looked at five times a second)."""
        loop = (
            f"end=$(( $(date +%s) + {timeout_s:.0f} )); until {command}; do "
            f'[ "$(date +%s)" -lt $end ] || exit 9; read -rt 0.2 <> <(:) || :; done'
        )
        return self.run(loop, timeout_s=timeout_s + 60)

    def wait_for_guest(self, name: str) -> None:
        """Until a guest's userland is up, but no longer than the guest itself is."""
        console = f"/var/log/libvirt/qemu/{name}-console.log"
        up = f"grep -aqs VFREADY {console}"
        try:
            # no virsh: five of them a second would take a lab all that the boot needs
            self.wait(f"{{ {up} || [ ! -e /run/libvirt/qemu/{name}.pid ]; }}", timeout_s=BOOT_S)
        except AssertionError:
            self._judge_boot(name, console)
            raise
        self.run(f"{up} || {{ echo guest {name} fell over in its boot; exit 7; }}")

    def _judge_boot(self, name: str, console: str) -> None:
        """A guest that boots says so; one that hangs may do it with no vCPU spinning."""
        look = f"stat -c %Y {console}; date +%s; virsh domstate {name}; tail -n 20 {console}"
        last, now, state, *text = self.run(look).splitlines()
        print(*text, sep="\n")
        silent_s = int(now) - int(last)
        stuck_s = max(map(int, STUCK.findall("\n".join(text))), default=0)
        if state == "running" and silent_s > SILENT_S:
            self.faults.append(f"guest {name} has said nothing for {silent_s} s of its boot")
        elif state == "running" and stuck_s > SILENT_S:
            self.faults.append(f"guest {name} is stuck in its boot for {stuck_s} s, by its kernel")

    def tell(self) -> str:
        """What the agent there did and sees, where one runs: to read beside a failure."""
        looks = ("tail -n 60 /var/log/virtfabricd.log", "virtfabric devices", "virtfabric guests")
        shown = "; ".join(f"echo '# {look}'; {look} 2>&1" for look in looks)
        try:
            return lab_command("run", self.name, f"COLUMNS=180; export COLUMNS; {shown}").stdout
        except subprocess.TimeoutExpired as error:  # a failure is to be told, whatever else hangs
            return f"{error}"

    def fault(self, name: str, target: str | None = None) -> str:
        """Inject a fault."""
        aim = ("--target", target) if target else ()
        done = lab_command("fault", self.name, name, *aim)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def qmp(self, command: str, arguments: dict[str, Any]) -> None:
        """Tell the lab's QEMU."""
        done = lab_command("qmp", self.name, command, json.dumps(arguments))
        assert done.returncode == 0, done.stderr

    def find_faults(self) -> list[str]:
        """What has hung or fallen over in it by no doing of what runs there."""
        done = lab_command("status", self.name, "--probe", "--json", timeout_s=400)
        if done.returncode:  # there is no lab to look into
            return self.faults
        return [*self.faults, *json.loads(done.stdout)["faults"]]


class Emulated(Protocol):
    """An emulated host that a test looks at, of whichever make."""

    @property
    def name(self) -> str: ...

    def find_faults(self) -> list[str]: ...

    def tell(self) -> str: ...


LABS: list[Emulated] = []
"""Those that are up now."""


def find_faults() -> list[str]:
    """What has hung or fallen over in the labs that are up, by no doing of what runs there."""
    return [f"{lab.name}: {fault}" for lab in LABS for fault in lab.find_faults()]


def bring_up(topology: str) -> Iterator[RunningLab]:
    """A lab of this topology, under a name of its own, for as long as the caller holds it."""
    lab = RunningLab(f"t{os.getpid()}-{topology}")
    LABS.append(lab)
    try:
        done = lab_command("up", topology, "--name", lab.name, timeout_s=UP_S)
        if done.returncode:  # an emulator that falls over does so in a boot as well
            print(done.stderr)
            done = lab_command("up", topology, "--name", lab.name, timeout_s=UP_S)
        assert done.returncode == 0, done.stderr
        yield lab
    finally:
        LABS.remove(lab)
        # pytest shows this beside a failure; a lab that died has said why here
        print(lab_command("console", "--log", lab.name).stdout[-6000:])
        print(lab_command("status", lab.name).stdout)
        gone = lab_command("down", lab.name)
        assert gone.returncode == 0, gone.stderr
