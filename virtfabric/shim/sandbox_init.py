"""PID 1 of a sandbox, and the way into one.

Owns what has to happen *inside* the sandbox's namespaces: mounts, cgroups, loopback, the
system bus, reaping. Standard library only: it is run by path with `python3 -IS`, so that it starts
in milliseconds whatever virtual environment the caller lives in. It must not import virtfabric.

    sandbox_init.py init SPEC            as PID 1; "ready" on stdout, lives until stdin closes
    sandbox_init.py enter SPEC PID ARGV  joins PID's namespaces and cgroups, then becomes ARGV
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
# linux/mount.h
_MS_NOSUID_NODEV = 2 | 4
_MS_BIND = 4096
_MS_REC_PRIVATE = 16384 | (1 << 18)
# linux/sockios.h, linux/if.h
_SIOCSIFFLAGS = 0x8914
_IFF_UP_RUNNING = 0x1 | 0x40

_NAMESPACES = {
    "cgroup": CLONE_NEWCGROUP,
    "ipc": CLONE_NEWIPC,
    "uts": CLONE_NEWUTS,
    "net": CLONE_NEWNET,
    "mnt": CLONE_NEWNS,  # last: the others are opened through the caller's /proc
}
_UNIFIED_CONTROLLERS = ("cpuset", "cpu", "memory", "io", "pids")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2); the target is created when it is missing."""
    target.mkdir(parents=True, exist_ok=True)
    outcome = _libc.mount(
        source.encode(), str(target).encode(), kind.encode(), flags, data.encode() or None
    )
    _check(outcome, f"mount {kind or 'bind'} {source} on {target}")


def _join_cgroups(spec: dict[str, Any], *, leaf: str = "") -> None:
    for group in spec["cgroups"]:
        inside = leaf if group["unified"] else ""
        (Path(group["directory"]) / inside / "cgroup.procs").write_text("0")


def _mount_cgroups(spec: dict[str, Any]) -> None:
    """Shows the sandbox's own groups as the roots of all hierarchies.

    A unified (v2) group that hands controllers down may hold no processes itself, so everything
    moves into a leaf named init.
    """
    for group in spec["cgroups"]:
        _mount(group["directory"], Path(group["mountpoint"]), "", _MS_BIND)
        if not group["unified"]:
            continue
        root = Path(group["mountpoint"])
        (root / "init").mkdir()
        (root / "init" / "cgroup.procs").write_text("0")
        offered = (root / "cgroup.controllers").read_text().split()
        for controller in _UNIFIED_CONTROLLERS:
            if controller in offered:
                (root / "cgroup.subtree_control").write_text(f"+{controller}")


def _mount_files(spec: dict[str, Any]) -> None:
    """A private /run, writable layers over /etc and /var/*, and the sandbox's own directories.

    The layers live on a tmpfs that only this mount namespace knows: a directory made in them
    (/etc/virtfabric, ...) never exists on the real host and is gone with the namespace.
    """
    layers = Path(spec["root"]) / "layers"
    _mount("tmpfs", layers, "tmpfs", _MS_NOSUID_NODEV, "mode=700")
    for lower in spec["layered"]:
        upper = layers / lower.strip("/").replace("/", "-")
        (upper / "upper").mkdir(parents=True)
        (upper / "work").mkdir()
        options = f"lowerdir={lower},upperdir={upper / 'upper'},workdir={upper / 'work'}"
        _mount("overlay", Path(lower), "overlay", 0, options)
    _mount("tmpfs", Path("/run"), "tmpfs", _MS_NOSUID_NODEV, "mode=755")
    for directory in ("/run/lock", "/run/dbus"):
        Path(directory).mkdir()
    for source, target in spec["binds"]:
        _mount(source, Path(target), "", _MS_BIND)
    Path("/etc/hosts").write_text(f"127.0.0.1 localhost {spec['hostname']}\n")


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", _IFF_UP_RUNNING)
        fcntl.ioctl(control, _SIOCSIFFLAGS, request)


def _start_bus(spec: dict[str, Any]) -> None:
    """Starts the system bus; returns once it listens (it then prints its address)."""
    log = Path(spec["bus_log"]).open("ab")  # noqa: SIM115  # stays open: it is the bus's stderr
    bus = subprocess.Popen(
        ["dbus-daemon", f"--config-file={spec['bus_config']}", "--nofork", "--print-address"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
    )
    if bus.stdout is None or not bus.stdout.readline():
        raise OSError(f"dbus-daemon did not start, see {spec['bus_log']}")


def _reap(_signal: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _init(spec: dict[str, Any]) -> None:
    _join_cgroups(spec)
    _check(_libc.unshare(sum(_NAMESPACES.values())), "unshare")
    _check(_libc.mount(None, b"/", None, _MS_REC_PRIVATE, None), "make / private")
    socket.sethostname(spec["hostname"])
    _mount("proc", Path("/proc"), "proc")
    _mount_cgroups(spec)
    _mount_files(spec)
    _bring_loopback_up()
    os.chdir("/")
    _start_bus(spec)
    signal.signal(signal.SIGCHLD, _reap)
    _reap(0, None)
    os.write(1, b"ready\n")
    while os.read(0, 4096):  # ends when the owner closes the pipe or dies
        pass


def _enter(spec: dict[str, Any], pid: int, argv: list[str]) -> None:
    _join_cgroups(spec, leaf="init")
    opened = {name: os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in _NAMESPACES}
    for name, descriptor in opened.items():
        _check(_libc.setns(descriptor, _NAMESPACES[name]), f"setns {name}")
        os.close(descriptor)
    os.chdir(spec.get("cwd", "/"))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execvp(argv[0], argv)


def main(argv: list[str]) -> None:
    """Runs one of the two modes; an `OSError` ends it with one line on stderr."""
    spec = json.loads(argv[1])
    try:
        if argv[0] == "init":
            _init(spec)
        else:
            _enter(spec, int(argv[2]), argv[3:])
    except OSError as error:
        sys.exit(f"sandbox {argv[0]}: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
