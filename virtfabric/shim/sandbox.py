"""A private host on this machine: own namespaces, system bus, libvirtd and cgroup subtree.

Owns the outside of a sandbox: its life, and what runs in it. The inside is made by
`sandbox_init.py`. It never talks to, restarts or reconfigures a libvirtd that runs already, and
leaves nothing but `root` (logs and configuration, for a look afterwards) when it stops.

A guest, libvirtd, the agent and everything else started in a sandbox are members of its PID
namespace: when its init ends, or the process that owns it, the kernel ends them all.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

from virtfabric.shim.patience import allow
from virtfabric.shim.sandbox_cgroups import Cgroup, read_cgroups, remove_cgroups
from virtfabric.shim.sandbox_process import (
    CLONE_NEWPID,
    SandboxError,
    call_libc,
    popen_into,
    read_tail,
    wait_until,
)
from virtfabric.shim.sandbox_root import BINDS, write_root

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

_INIT = Path(__file__).with_name("sandbox_init.py")
_LAYERED = ("/etc", "/var/lib", "/var/log", "/var/cache")
# A root below one of these would be hidden by the sandbox's own mounts.
_HIDDEN = ("/etc", "/var/lib", "/var/log", "/var/cache", "/run", "/proc", "/sys", "/dev")
_LIBVIRT_SOCKET = "/run/libvirt/libvirt-sock"
_BUS_SOCKET = "/run/dbus/system_bus_socket"


class Sandbox:
    """A host of its own; `with Sandbox("a", tmp_path / "a") as box: box.start_libvirtd()`.

    Needs root. Default paths work inside: /run/libvirt, /run/virtfabric, the system bus,
    /etc/virtfabric, /var/lib/virtfabric. `start` wipes `root`; `stop` leaves it for a look.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        hooks_at_start: bool = True,
        libvirtd_conf: str = "",
        qemu_conf: str = "",
    ) -> None:
        """Describes a sandbox; nothing is touched before `start`.

        Args:
            name: unique on this machine; also its hostname and the suffix of its cgroups.
            root: its directory, made when missing; not below /etc, /run or /var/lib.
            hooks_at_start: whether libvirtd finds one inert hook script when it starts; without
                any it ignores those added later.
            libvirtd_conf: lines to append to libvirtd.conf.
            qemu_conf: lines to append to qemu.conf.
        """
        self.name = name
        self.root = root.resolve()
        if any(self.root.is_relative_to(hidden) for hidden in _HIDDEN):
            raise SandboxError(f"root {self.root} would be hidden inside the sandbox")
        self._hooks_at_start = hooks_at_start
        self._extra_conf = {"libvirtd_conf": libvirtd_conf, "qemu_conf": qemu_conf}
        self._cgroups: tuple[Cgroup, ...] = ()
        self._claim: socket.socket | None = None
        self._root_lock: int | None = None
        self._init: subprocess.Popen[str] | None = None
        self._libvirtd: subprocess.Popen[str] | None = None
        self._started: list[subprocess.Popen[str]] = []

    # -- life -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, *, timeout_s: float = 20.0) -> None:
        """Brings the host up (without libvirtd), after removing what a crashed one left.

        Raises:
            SandboxError: not root, the name is taken by a living sandbox, or a step failed.
        """
        self._claim_name()
        try:
            self._cgroups = read_cgroups(self.name)
            remove_cgroups(self._cgroups, self.name)
            write_root(self.root, hooks_at_start=self._hooks_at_start, **self._extra_conf)
            for group in self._cgroups:
                group.create()
            self._start_init(timeout_s)
        except OSError as error:
            self.stop()
            raise SandboxError(f"sandbox {self.name}: {error}") from error
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends everything in the sandbox and removes its cgroups; may be repeated."""
        if self._init is not None:
            self._init.kill()
            # Its end waits until every member is reaped, and those from `popen` are our children.
            for process in self._started:
                process.wait()
            self._init.wait()
            for pipe in (self._init.stdin, self._init.stdout):
                if pipe is not None:
                    pipe.close()
        self._init = self._libvirtd = None
        self._started.clear()
        try:
            remove_cgroups(self._cgroups, self.name)
        finally:
            self._release_name()

    def _claim_name(self) -> None:
        # An abstract socket: one holder, released by the kernel, nothing on disk.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0virtfabric-sandbox-{self.name}")
        except OSError as error:
            claim.close()
            raise SandboxError(f"a sandbox named {self.name} is running") from error
        self._claim = claim
        self.root.mkdir(parents=True, exist_ok=True)
        self._root_lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._root_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._release_name()
            raise SandboxError(f"a running sandbox uses {self.root}") from error

    def _release_name(self) -> None:
        if self._claim is not None:
            self._claim.close()
        if self._root_lock is not None:
            os.close(self._root_lock)
        self._claim = self._root_lock = None

    def _describe(self, **extra: str) -> str:
        return json.dumps(
            {
                "hostname": self.name,
                "root": str(self.root),
                "layered": _LAYERED,
                "binds": [(str(self.root / source), target) for source, target in BINDS],
                "bus_config": str(self.root / "bus.conf"),
                "bus_log": str(self.root / "bus.log"),
                "cgroups": [
                    {
                        "mountpoint": str(group.mountpoint),
                        "directory": str(group.directory),
                        "unified": group.unified,
                    }
                    for group in self._cgroups
                ],
                **extra,
            }
        )

    def _start_init(self, timeout_s: float) -> None:
        with (self.root / "init.log").open("w") as log:
            self._init = popen_into(
                lambda: call_libc("unshare", CLONE_NEWPID),
                [sys.executable, "-IS", str(_INIT), "init", self._describe()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        output = cast("IO[str]", self._init.stdout)
        ready, _, _ = select.select([output], [], [], allow(timeout_s))
        if not ready or output.readline() != "ready\n":
            raise SandboxError(
                f"sandbox {self.name} did not start:\n{read_tail(self.root / 'init.log')}"
            )

    # -- inside -----------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Its init, as the host counts; `/proc/<pid>/root` is its file system."""
        if self._init is None:
            raise SandboxError(f"sandbox {self.name} is not running")
        return self._init.pid

    @property
    def libvirt_pid(self) -> int:
        """Its libvirtd, as the host counts."""
        if self._libvirtd is None:
            raise SandboxError(f"sandbox {self.name} has no libvirtd")
        return self._libvirtd.pid

    @property
    def libvirt_uri(self) -> str:
        """For a client *outside* of the sandbox; inside, qemu:///system is right."""
        return f"qemu+unix:///system?socket={self.path(_LIBVIRT_SOCKET)}"

    @property
    def bus_address(self) -> str:
        """Its system bus for a client *outside* of the sandbox."""
        return f"unix:path={self.path(_BUS_SOCKET)}"

    def path(self, inside: str) -> Path:
        """Where the host sees the sandbox's absolute path `inside`, while it runs."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def popen(self, argv: Sequence[str], *, cwd: str = "/", **kw: Any) -> subprocess.Popen[str]:
        """Starts a command inside; text mode, `kw` as for `subprocess.Popen`.

        The result's pid is the host's number for the command itself.
        """
        namespace = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._started = [process for process in self._started if process.poll() is None]
        try:
            process = popen_into(
                lambda: call_libc("setns", namespace, CLONE_NEWPID),
                [
                    *(sys.executable, "-IS", str(_INIT), "enter", self._describe(cwd=cwd)),
                    *(str(self.pid), *argv),
                ],
                **kw,
            )
        finally:
            os.close(namespace)
        self._started.append(process)
        return process

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout_s: float = 60.0,
        stdin: str = "",
        cwd: str = "/",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside to its end and captures what it prints.

        Raises:
            SandboxError: with `check`, it ended with another status than 0; or it took longer
                than `timeout_s` and was killed.
        """
        pipe = subprocess.PIPE
        process = self.popen(argv, cwd=cwd, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
        with process:
            try:
                out, err = process.communicate(stdin, timeout=allow(timeout_s))
            except subprocess.TimeoutExpired as error:
                process.kill()
                raise SandboxError(
                    f"{argv[0]} took over {allow(timeout_s):g} s: {list(argv)}"
                ) from error
            except BaseException:
                process.kill()
                raise
        if check and process.returncode:
            tail = "\n".join((out + err).splitlines()[-15:])
            raise SandboxError(f"{list(argv)} ended with {process.returncode}:\n{tail}")
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)

    def reload_bus(self) -> None:
        """Makes the system bus read its policy files again."""
        bus, reload = "org.freedesktop.DBus", "org.freedesktop.DBus.ReloadConfig"
        self.run(["dbus-send", "--system", "--print-reply", f"--dest={bus}", "/", reload])

    def start_libvirtd(self, *, timeout_s: float = 30.0) -> None:
        """Starts libvirtd and waits until it answers; running guests are found again.

        Raises:
            SandboxError: it ended or did not answer in time.
        """
        log = self.root / "libvirtd.log"
        with log.open("a") as output:
            process = self.popen(
                ["libvirtd"], stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self._libvirtd = process
        socket_path = str(self.path(_LIBVIRT_SOCKET))

        def answers() -> bool:
            if process.poll() is not None:
                raise SandboxError(f"libvirtd ended with {process.returncode}:\n{read_tail(log)}")
            with socket.socket(socket.AF_UNIX) as client:
                return client.connect_ex(socket_path) == 0

        try:
            wait_until(answers, "libvirtd answers", timeout_s=timeout_s)
        except SandboxError as error:
            process.kill()
            raise SandboxError(f"{error}\n{read_tail(log)}") from error

    def kill_libvirtd(self, sig: signal.Signals = signal.SIGKILL, *, timeout_s: float = 30) -> None:
        """Ends libvirtd with `sig` and waits for it; its guests go on."""
        if self._libvirtd is None:
            raise SandboxError(f"sandbox {self.name} has no libvirtd")
        self._libvirtd.send_signal(sig)
        try:
            self._libvirtd.wait(allow(timeout_s))
        except subprocess.TimeoutExpired as error:
            tail = read_tail(self.root / "libvirtd.log")
            raise SandboxError(f"libvirtd lives on after {sig.name}:\n{tail}") from error
        self._libvirtd = None
