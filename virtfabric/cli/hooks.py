"""`virtfabric hooks install|uninstall|status`: our script among others in libvirt's `qemu.d/`.

It writes files and reads /proc. It never restarts libvirtd: it says when that is needed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.screen import Table, note, print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, FAILED
from virtfabric.model.errors import InstallationError, InvalidValueError
from virtfabric.resources import hooks_dir

if TYPE_CHECKING:
    import argparse

HOOKS_DIR: Final = "etc/libvirt/hooks"
HOOK_PATH: Final = f"{HOOKS_DIR}/qemu.d/50-virtfabric"
DEFAULT_SOCKET: Final = "/run/virtfabric/hook.sock"
_SOCKET_LINE: Final = re.compile(r'^SOCKET = "(.*)"$', re.MULTILINE)
_SOCKET_PATH: Final = re.compile(r"/[A-Za-z0-9_.@:+,/-]{1,100}")
_DAEMONS: Final = ("libvirtd", "virtqemud")


class Outcome(StrEnum):
    """What happened to a file."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    KEPT = "kept"
    REMOVED = "removed"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file and what happened to it."""

    path: Path
    outcome: Outcome

    def to_json(self) -> dict[str, str]:
        """For `--json`."""
        return {"path": str(self.path), "outcome": self.outcome.value}


def write_file(path: Path, text: str, mode: int) -> FileReport:
    """Bring a file to this content and mode, whole or not at all.

    Raises:
        InstallationError: names the path.
    """
    try:
        if path.is_file() and path.read_text("utf-8", "replace") == text:
            path.chmod(mode)
            return FileReport(path, Outcome.UNCHANGED)
        outcome = Outcome.UPDATED if path.exists() else Outcome.CREATED
        path.parent.mkdir(parents=True, exist_ok=True)
        # The dot keeps libvirt and others that read directories from picking up half a file.
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text, "utf-8")
        temporary.chmod(mode)
        temporary.rename(path)
    except OSError as error:
        raise InstallationError(
            f"{path}: {error.strerror}", advice="run it as root, or give --root DIR"
        ) from error
    return FileReport(path, outcome)


def remove_file(path: Path, root: Path, *, own_directories: tuple[str, ...]) -> FileReport:
    """Remove a file, and directories above it that are empty then and ours to remove.

    Args:
        path: the file, below `root`.
        root: where `/` is.
        own_directories: relative to the root; below another root than `/` (where only we
            installed) every empty directory goes.

    Raises:
        InstallationError: names the path.
    """
    try:
        path.unlink()
        outcome = Outcome.REMOVED
    except FileNotFoundError:
        outcome = Outcome.ABSENT
    except OSError as error:
        raise InstallationError(f"{path}: {error.strerror}", advice="run it as root") from error
    for parent in path.parents:
        ours = root != Path("/") or str(parent.relative_to(root)) in own_directories
        if parent == root or not ours or not _remove_empty(parent):
            break
    return FileReport(path, outcome)


def _remove_empty(directory: Path) -> bool:
    try:
        directory.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def hook_text(socket: str) -> str:
    """The script with its socket set.

    Raises:
        InvalidValueError: not a path that can be a socket.
        InstallationError: the script is not shipped.
    """
    if not _SOCKET_PATH.fullmatch(socket):
        raise InvalidValueError("--socket", socket, "is not an absolute path of a socket")
    text = (hooks_dir() / "qemu").read_text("utf-8")
    return _SOCKET_LINE.sub(f'SOCKET = "{socket}"', text, count=1)


def install_hook(root: Path, socket: str) -> FileReport:
    """Put the script in place; repeating is safe.

    Raises:
        InvalidValueError, InstallationError
    """
    return write_file(root / HOOK_PATH, hook_text(socket), 0o755)


def uninstall_hook(root: Path) -> FileReport:
    """Remove the script; other hooks stay.

    Raises:
        InstallationError
    """
    return remove_file(root / HOOK_PATH, root, own_directories=(f"{HOOKS_DIR}/qemu.d",))


def read_qemu_hooks(root: Path) -> list[Path]:
    """Every script that libvirt runs for QEMU guests, ours included, in libvirt's order."""
    main = root / HOOKS_DIR / "qemu"
    directory = root / HOOKS_DIR / "qemu.d"
    scripts = sorted(directory.iterdir()) if directory.is_dir() else []
    return [p for p in (main, *scripts) if p.is_file() and os.access(p, os.X_OK)]


@dataclass(frozen=True, slots=True)
class DaemonStart:
    """A running libvirt daemon; `started` is UNIX seconds."""

    name: str
    pid: int
    started: float


def read_daemons(proc: Path = Path("/proc")) -> list[DaemonStart]:
    """The libvirt daemons of this host that run guests, those in other mount namespaces apart."""
    found = []
    try:
        here = (proc / "self/ns/mnt").readlink()
        boot = int(re.findall(r"^btime (\d+)", (proc / "stat").read_text(), re.MULTILINE)[0])
    except (OSError, IndexError):
        return []
    for entry in proc.glob("[0-9]*"):
        try:
            name = (entry / "comm").read_text().strip()
            if name not in _DAEMONS or (entry / "ns/mnt").readlink() != here:
                continue
            # Field 22 of /proc/PID/stat, proc_pid_stat(5), counted after the name's bracket.
            ticks = int((entry / "stat").read_text().rpartition(")")[2].split()[19])
        except (OSError, ValueError, IndexError):
            continue
        started = boot + ticks / os.sysconf("SC_CLK_TCK")
        found.append(DaemonStart(name, int(entry.name), started))
    return found


def check_noticed(hook_times: list[float], daemon: DaemonStart | None) -> tuple[bool, str]:
    """Whether libvirtd runs the hooks, as far as one can tell from outside.

    A libvirtd that started when no QEMU hook existed ignores hooks until it is restarted; one
    that saw any takes up changes at once (measured, libvirt 11.3; src/util/virhook.c).

    Args:
        hook_times: of each script, when its inode last changed (UNIX seconds).
        daemon: None when none runs.

    Returns:
        Whether a restart is needed, and why we think so.
    """
    if daemon is None:
        return False, "no libvirtd or virtqemud runs; the next one to start sees the hook"
    if not hook_times:
        return False, "no hook is installed"
    who = f"{daemon.name} (pid {daemon.pid})"
    # 1 s: the boot time in /proc/stat is in whole seconds.
    if min(hook_times) <= daemon.started - 1:
        return False, f"{who} started when a hook was there already, so it runs all of them"
    return True, (
        f"every hook script was created or changed after {who} started. If none was there at that "
        f"time, it ignores hooks until: systemctl restart {daemon.name} (guests keep running). "
        "If ours was merely updated, it runs already; a restart does no harm"
    )


def read_status(root: Path, daemons: list[DaemonStart] | None = None) -> dict[str, Any]:
    """`{"installed", "current", "path", "socket", "others", "restart_needed", "why"}`."""
    path = root / HOOK_PATH
    hooks = read_qemu_hooks(root)
    text = path.read_text("utf-8", "replace") if path in hooks else ""
    match = _SOCKET_LINE.search(text)
    socket = match[1] if match else ""
    restart, why = False, f"not looked at: {root} is not this host's root"
    if root == Path("/") or daemons is not None:
        running = read_daemons() if daemons is None else daemons
        # Of several (libvirtd beside virtqemud) the earliest is the one that may have missed it.
        earliest = min(running, key=lambda d: d.started, default=None)
        restart, why = check_noticed([h.stat().st_ctime for h in hooks], earliest)
    return {
        "installed": path in hooks, "path": str(path), "socket": socket,
        "current": bool(socket) and text == hook_text(socket),
        "others": [str(h) for h in hooks if h != path],
        "restart_needed": restart, "why": why,
    }  # fmt: skip


def report_files(files: list[FileReport]) -> None:
    """A line per file."""
    rows = tuple((f.outcome.value, str(f.path)) for f in files)
    print_tables([Table("files", ("outcome", "path"), rows)])


def _finish(args: argparse.Namespace, report: FileReport) -> int:
    status = read_status(args.root)
    if args.json:
        print_json({"files": [report.to_json()], **status})
    else:
        report_files([report])
        if status["installed"]:
            note(status["why"])
    return DONE


def _install(args: argparse.Namespace) -> int:
    return _finish(args, install_hook(args.root, args.socket))


def _uninstall(args: argparse.Namespace) -> int:
    return _finish(args, uninstall_hook(args.root))


def _status(args: argparse.Namespace) -> int:
    status = read_status(args.root)
    ok = status["installed"] and status["current"] and not status["restart_needed"]
    if args.json:
        print_json(status)
        return DONE if ok else FAILED
    state = "installed" if status["installed"] else "not installed: virtfabric hooks install"
    if status["installed"] and not status["current"]:
        state += ", but not this version's: virtfabric hooks install"
    lines = [f"hook: {state}", f"path: {status['path']}"]
    if status["installed"]:
        lines += [f"socket: {status['socket']}"]
    lines += [f"beside it: {', '.join(status['others']) or 'no other hook'}"]
    lines += [f"restart needed: {'perhaps' if status['restart_needed'] else 'no'}", status["why"]]
    print_lines(lines)
    return DONE if ok else FAILED


def root_directory(text: str) -> Path:
    """A `type` for `--root`: an absolute path."""
    return Path(text).resolve()


def add_root(parser: argparse.ArgumentParser) -> None:
    """The `--root` option."""
    parser.add_argument(
        "--root", type=root_directory, default=Path("/"), metavar="DIR",
        help="install below this directory, for packagers (default: /)",
    )  # fmt: skip


def add_parsers(subparsers: Any) -> None:
    """Register `hooks`."""
    text = "libvirt's hook: install, uninstall, status"
    hooks = subparsers.add_parser("hooks", help=text, description=text)
    actions = hooks.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_text, run in (
        ("install", "put the hook beside others in qemu.d/", _install),
        ("uninstall", "remove our hook, leave others", _uninstall),
        ("status", "is it there, is it ours, does libvirtd run it", _status),
    ):
        parser = actions.add_parser(name, help=help_text, description=help_text)
        add_root(parser)
        if name == "install":
            parser.add_argument(
                "--socket", default=DEFAULT_SOCKET, metavar="PATH",
                help="the agent's hook socket (default: %(default)s)",
            )  # fmt: skip
        parser.set_defaults(run=run)
