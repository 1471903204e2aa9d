"""`virtfabric install` and `uninstall`: hook, bus policy, polkit actions, unit, configuration.

Vendor files go below /usr (what an administrator puts in /etc overrides them), so that packagers
can use the same command with `--root`. Nothing is started, enabled, reloaded or restarted.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.hooks import (
    DEFAULT_SOCKET,
    FileReport,
    Outcome,
    add_root,
    install_hook,
    read_status,
    remove_file,
    report_files,
    uninstall_hook,
    write_file,
)
from virtfabric.cli.screen import note, print_json
from virtfabric.cli.session import DONE

if TYPE_CHECKING:
    import argparse

_SHIPPED: Final = Path(__file__).with_name("shipped")
_OWN_DIRECTORIES: Final = ("etc/virtfabric",)
BUS_POLICY: Final = "usr/share/dbus-1/system.d/org.virtfabric1.conf"
UNIT: Final = "usr/lib/systemd/system/virtfabricd.service"


@dataclass(frozen=True, slots=True)
class ShippedFile:
    """A file of `shipped/` and where it goes. `owned_by_admin`: never overwritten when changed."""

    name: str
    target: str
    owned_by_admin: bool = False


FILES: Final = (
    ShippedFile("org.virtfabric1.conf", BUS_POLICY),
    ShippedFile("org.virtfabric1.policy", "usr/share/polkit-1/actions/org.virtfabric1.policy"),
    ShippedFile("virtfabricd.service", UNIT),
    ShippedFile("virtfabric.toml", "etc/virtfabric/virtfabric.toml", owned_by_admin=True),
)


def shipped_text(name: str, bindir: str) -> str:
    """A shipped file, with the place of the programs filled in."""
    return (_SHIPPED / name).read_text("utf-8").replace("@BINDIR@", bindir)


def default_bindir(root: Path) -> str:
    """Where `virtfabricd` is: beside this command, else on the path; /usr/bin for packagers."""
    if root != Path("/"):
        return "/usr/bin"
    beside = Path(sys.argv[0]).absolute().parent
    if (beside / "virtfabricd").is_file():
        return str(beside)
    found = shutil.which("virtfabricd")
    return str(Path(found).parent) if found else "/usr/bin"


def install_all(root: Path, socket: str, bindir: str) -> list[FileReport]:
    """Install everything; repeating changes nothing.

    Raises:
        InvalidValueError, InstallationError
    """
    reports = [install_hook(root, socket)]
    for file in FILES:
        path = root / file.target
        text = shipped_text(file.name, bindir)
        if file.owned_by_admin and path.exists():
            same = path.read_text("utf-8", "replace") == text
            reports.append(FileReport(path, Outcome.UNCHANGED if same else Outcome.KEPT))
        else:
            reports.append(write_file(path, text, 0o644))
    return reports


def uninstall_all(root: Path) -> list[FileReport]:
    """Remove what `install_all` wrote; a configuration that was edited stays.

    Raises:
        InstallationError
    """
    reports = [uninstall_hook(root)]
    for file in FILES:
        path = root / file.target
        if file.owned_by_admin and path.exists() and not _is_shipped(path, file):
            reports.append(FileReport(path, Outcome.KEPT))
        else:
            reports.append(remove_file(path, root, own_directories=_OWN_DIRECTORIES))
    return reports


def _is_shipped(path: Path, file: ShippedFile) -> bool:
    return path.read_text("utf-8", "replace") == shipped_text(file.name, "")


def _install(args: argparse.Namespace) -> int:
    bindir = args.bindir or default_bindir(args.root)
    reports = install_all(args.root, args.socket, bindir)
    status = read_status(args.root)
    if args.json:
        print_json({"files": [r.to_json() for r in reports], "hook": status})
        return DONE
    report_files(reports)
    if args.root == Path("/"):
        note(status["why"])
        note("then: systemctl daemon-reload && systemctl reload dbus")
        note("      systemctl enable --now virtfabricd && virtfabric doctor")
    return DONE


def _uninstall(args: argparse.Namespace) -> int:
    reports = uninstall_all(args.root)
    if args.json:
        print_json({"files": [r.to_json() for r in reports]})
        return DONE
    report_files(reports)
    if args.root == Path("/"):
        note("state stays in /var/lib/virtfabric, with the audit log; remove it by hand")
    return DONE


def add_parsers(subparsers: Any) -> None:
    """Register `install` and `uninstall`."""
    text = "install hook, bus policy, polkit actions, systemd unit, sample configuration"
    install = subparsers.add_parser("install", help=text, description=text)
    install.add_argument(
        "--socket", default=DEFAULT_SOCKET, metavar="PATH",
        help="the agent's hook socket (default: %(default)s)",
    )  # fmt: skip
    install.add_argument(
        "--bindir", metavar="DIR", help="where virtfabricd is (default: beside this command)"
    )
    text = "remove what install wrote; an edited configuration stays"
    uninstall = subparsers.add_parser("uninstall", help=text, description=text)
    for parser, run in ((install, _install), (uninstall, _uninstall)):
        add_root(parser)
        parser.set_defaults(run=run)
