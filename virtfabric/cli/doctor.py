"""`virtfabric doctor`: looks at the host and says what is wrong and how to mend it.

Reads only; the exceptions are throw-away probes (a connection, a KVM handle).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from virtfabric.cli.devicechecks import (
    check_iommu,
    check_pools,
    check_ports,
    check_quarantine,
    check_vfio,
)
from virtfabric.cli.findings import Finding, Verdict
from virtfabric.cli.hooks import read_status
from virtfabric.cli.install import BUS_POLICY
from virtfabric.cli.memorychecks import (
    check_known_nodes,
    check_new_memory,
    check_nodes,
    check_tools,
)
from virtfabric.cli.screen import Table, print_json, print_lines, print_tables
from virtfabric.cli.session import DONE, FAILED, ask
from virtfabric.config import CONFIG_DIR, Config, load_config
from virtfabric.model.errors import ConfigError, InstallationError, VirtfabricError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

LIBVIRT_FLOOR: Final = (9, 0, 0)
QEMU_FLOOR: Final = (7, 2, 0)
_CONTROLLERS: Final = ("cpu", "cpuset")
_KVM_GET_API_VERSION: Final = 0xAE00
_KVM_CREATE_VM: Final = 0xAE01
"""linux/kvm.h: _IO(KVMIO, 0x01)."""


def format_version(number: int) -> str:
    """libvirt's 1000000 * major + 1000 * minor + release, as text."""
    return ".".join(str(n) for n in split_version(number))


def split_version(number: int) -> tuple[int, int, int]:
    """The three parts of libvirt's version number."""
    return number // 1_000_000, number // 1000 % 1000, number % 1000


def check_version(name: str, number: int, floor: tuple[int, int, int]) -> Finding:
    """Compare with the floor."""
    least = ".".join(str(n) for n in floor)
    if split_version(number) >= floor:
        return Finding(name, Verdict.OK, f"{format_version(number)} (at least {least})")
    detail = f"{format_version(number)} is older than {least}"
    return Finding(name, Verdict.FAIL, detail, f"upgrade: Debian 12 and later have {least}")


def check_hypervisor(uri: str) -> Iterator[Finding]:
    """libvirt reachable, libvirt and QEMU recent enough."""
    try:
        libvirt: Any = import_module("libvirt")
    except ImportError as error:
        yield Finding("libvirt", Verdict.FAIL, str(error), "install libvirt-python")
        return
    # libvirt prints errors to stderr unless somebody takes them.
    libvirt.registerErrorHandler(lambda *_: None, None)
    try:
        connection = libvirt.openReadOnly(uri)
    except libvirt.libvirtError as error:
        mend = "systemctl start libvirtd (or virtqemud.socket); is agent.uri right?"
        yield Finding("libvirt", Verdict.FAIL, f"{uri}: {error}", mend)
        return
    try:
        yield check_version("libvirt", connection.getLibVersion(), LIBVIRT_FLOOR)
        yield check_version("qemu", connection.getVersion(), QEMU_FLOOR)
        yield from check_known_nodes(connection.getCapabilities())
    except libvirt.libvirtError as error:
        yield Finding("qemu", Verdict.FAIL, str(error), "install qemu-system-x86")
    finally:
        connection.close()


def check_cgroups(root: Path = Path("/")) -> Iterator[Finding]:
    """Version and the controllers that quotas and cpusets need."""
    unified = root / "sys/fs/cgroup/cgroup.controllers"
    if unified.is_file():
        version, have = 2, set(unified.read_text().split())
    else:
        version, have = 1, _v1_controllers(root)
    missing = [name for name in _CONTROLLERS if name not in have]
    detail = f"version {version}, controllers {' '.join(sorted(have)) or 'none'}"
    if missing:
        mend = f"enable {' and '.join(missing)} (kernel command line: cgroup_disable, systemd)"
        yield Finding("cgroups", Verdict.FAIL, detail, mend)
    else:
        yield Finding("cgroups", Verdict.OK, detail)


def _v1_controllers(root: Path) -> set[str]:
    try:
        rows = [r.split() for r in (root / "proc/cgroups").read_text().splitlines()[1:]]
    except OSError:
        return set()
    return {row[0] for row in rows if row[-1] == "1"}


def check_kvm() -> Iterator[Finding]:
    """Whether KVM runs a guest here, by booting one where the guest image is there."""
    mend = "without KVM guests run under TCG, slowly: enable virtualisation, load kvm_intel/kvm_amd"
    booted = _boot_under_kvm()
    if booted is not None:
        detail = "a guest boots under KVM" if booted else "no guest boots under KVM"
        verdict = Verdict.OK if booted else Verdict.WARN
        yield Finding("kvm", verdict, f"{detail} (measured)", "" if booted else mend)
        return
    problem = _create_vm()
    if problem:
        yield Finding("kvm", Verdict.WARN, problem, mend)
    else:
        detail = "/dev/kvm creates a VM (no guest was booted: the test image is not built)"
        yield Finding("kvm", Verdict.OK, detail)


def _boot_under_kvm() -> bool | None:
    """None where there is no image to boot: building one takes minutes, so it is not done here."""
    try:
        images, probe = (import_module(f"virtfabric.shim.{n}") for n in ("guestimage", "kvmprobe"))
    except ImportError:
        return None
    final = images.guest_cache() / images.format_recipe_key()
    if not final.is_dir():
        return None
    try:
        return bool(probe.probe_kvm(images.ensure_guest_image()))
    except (OSError, VirtfabricError, subprocess.SubprocessError):
        return None


def _create_vm() -> str:
    """What is wrong with /dev/kvm; empty when it made a VM."""
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    try:
        if fcntl.ioctl(device, _KVM_GET_API_VERSION, 0) != 12:
            return "/dev/kvm: not API version 12"
        os.close(fcntl.ioctl(device, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"/dev/kvm makes no VM: {error.strerror}"
    finally:
        os.close(device)
    return ""


def check_hooks(config: Config) -> Iterator[Finding]:
    """Installed, this version's, pointing to the agent's socket, and run by libvirtd."""
    mend = "virtfabric hooks install"
    try:
        status = read_status(Path("/"))
    except InstallationError as error:
        yield Finding("hooks", Verdict.FAIL, str(error), error.advice)
        return
    socket = str(config.agent.hook_socket)
    if not status["installed"]:
        yield Finding("hooks", Verdict.FAIL, "libvirt has no hook of ours", mend)
    elif not status["current"]:
        yield Finding("hooks", Verdict.WARN, f"{status['path']} is not this version's", mend)
    elif status["socket"] != socket:
        detail = f"the hook asks {status['socket']}, the agent listens at {socket}"
        yield Finding("hooks", Verdict.FAIL, detail, f"{mend} --socket {socket}")
    elif status["restart_needed"]:
        yield Finding("hooks", Verdict.WARN, "libvirtd may not run it", status["why"])
    else:
        yield Finding("hooks", Verdict.OK, status["why"])


def check_bus_policy(config: Config, root: Path = Path("/")) -> Iterator[Finding]:
    """The system bus lets root own the name only where a policy file says so."""
    if config.agent.bus:
        yield Finding("bus policy", Verdict.OK, f"not needed: the bus is {config.agent.bus}")
        return
    places = (root / BUS_POLICY, root / "etc/dbus-1/system.d/org.virtfabric1.conf")
    found = next((p for p in places if p.is_file()), None)
    if found:
        yield Finding("bus policy", Verdict.OK, str(found))
    else:
        mend = "virtfabric install, then systemctl reload dbus"
        yield Finding("bus policy", Verdict.FAIL, f"{places[0]} is missing", mend)


def check_agent(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether the agent answers, and its own alerts."""
    try:
        health = ask(args, "Health")
    except VirtfabricError as error:
        yield Finding("agent", Verdict.FAIL, str(error), "systemctl start virtfabricd")
        return
    alerts = health.get("alerts") or []
    detail = f"version {health.get('version', '?')} answers"
    if alerts:
        yield Finding("agent", Verdict.WARN, f"{detail}; alerts: {len(alerts)}", str(alerts[-1]))
    else:
        yield Finding("agent", Verdict.OK, detail)


def check_devices(args: argparse.Namespace, config: Config) -> Iterator[Finding]:
    """Pools, quarantine and free ports, as the agent sees them; nothing while it is away."""
    try:
        functions, guests = ask(args, "ListDevices"), ask(args, "ListGuests")
    except VirtfabricError:
        return
    yield from check_pools(config.pools, functions)
    yield from check_quarantine(functions)
    if config.pools:
        yield from check_ports(guests)


def check_memory(args: argparse.Namespace, config: Config) -> Iterator[Finding]:
    """Nodes of which nothing is granted, as the agent sees them; nothing while it is away."""
    try:
        host = ask(args, "GetHost")
    except VirtfabricError:
        return
    yield from check_nodes(host, config.capacity)


def check_apparmor(root: Path = Path("/")) -> Iterator[Finding]:
    """AppArmor is expected on Debian and Ubuntu; its profile lets libvirt run hooks."""
    switch = root / "sys/module/apparmor/parameters/enabled"
    enabled = switch.is_file() and switch.read_text().strip() == "Y"
    detail = "on" if enabled else "off: guests are confined by nothing, or by SELinux"
    yield Finding("apparmor", Verdict.OK if enabled else Verdict.WARN, detail)


def check_state_dir(config: Config) -> Iterator[Finding]:
    """Root's alone: the journal says what to do to guests, and the audit key is in it."""
    path = config.agent.state_dir
    try:
        status = path.stat()
    except FileNotFoundError:
        detail = f"{path} is not there yet; the agent makes it"
        yield Finding("state", Verdict.WARN, detail, "systemctl start virtfabricd")
        return
    except OSError as error:
        yield Finding("state", Verdict.WARN, f"{path}: {error.strerror}", "run doctor as root")
        return
    if status.st_uid != 0 or status.st_mode & 0o077:
        detail = f"{path} has mode {status.st_mode & 0o7777:04o}, owner uid {status.st_uid}"
        yield Finding("state", Verdict.FAIL, detail, f"chown root {path}; chmod 0700 {path}")
    else:
        free = shutil.disk_usage(path).free >> 20
        verdict, mend = (Verdict.OK, "") if free >= 64 else (Verdict.WARN, "make room")
        yield Finding("state", verdict, f"{path}, {free} MiB free", mend)


def examine(args: argparse.Namespace) -> list[Finding]:
    """Run every check; a broken configuration is a finding, and the rest goes by the defaults."""
    findings = []
    try:
        config = load_config(args.config)
        where = str(args.config) if args.config.exists() else f"no {args.config}: the defaults"
        findings.append(Finding("configuration", Verdict.OK, where))
    except ConfigError as error:
        config = Config()
        findings.append(Finding("configuration", Verdict.FAIL, str(error), error.advice))
    if args.bus is None and config.agent.bus:
        args.bus = config.agent.bus
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: check_hypervisor(args.uri or config.agent.uri),
        check_cgroups,
        check_kvm,
        check_apparmor,
        lambda: check_hooks(config),
        lambda: check_bus_policy(config),
        lambda: check_state_dir(config),
        lambda: check_iommu(wanted=bool(config.pools)),
        lambda: check_vfio(wanted=bool(config.pools)),
        lambda: check_agent(args),
        lambda: check_devices(args, config),
        check_tools,
        check_new_memory,
        lambda: check_memory(args, config),
    )
    for check in checks:
        findings.extend(check())
    return findings


def _doctor(args: argparse.Namespace) -> int:
    findings = examine(args)
    healthy = all(f.verdict is not Verdict.FAIL for f in findings)
    if args.json:
        print_json({"healthy": healthy, "checks": [f.to_json() for f in findings]})
        return DONE if healthy else FAILED
    rows = tuple((f.verdict.value.upper(), f.name, f.detail) for f in findings)
    print_tables([Table("doctor", ("verdict", "check", "found"), rows)])
    mends = [f"{f.name}: {f.mend}" for f in findings if f.mend]
    if mends:
        print_lines(["", "how to mend:", *(f"  {line}" for line in mends)])
    return DONE if healthy else FAILED


def add_parsers(subparsers: Any) -> None:
    """Register `doctor`."""
    text = "check libvirt, cgroups, KVM, hooks, bus, state, devices, memory; say how to mend each"
    parser = subparsers.add_parser("doctor", help=text, description=text)
    parser.add_argument(
        "--config", type=Path, default=CONFIG_DIR, metavar="PATH",
        help="the agent's configuration (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--uri", help="libvirt connection (default: agent.uri)")
    parser.set_defaults(run=_doctor)
