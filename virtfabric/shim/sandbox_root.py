"""What is in a sandbox's directory: the configuration of its libvirtd and bus, and its logs."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Final

BINDS: Final = (
    ("etc-libvirt", "/etc/libvirt"),
    ("lib-libvirt", "/var/lib/libvirt"),
    ("log-libvirt", "/var/log/libvirt"),
    ("cache-libvirt", "/var/cache/libvirt"),
    ("etc-virtfabric", "/etc/virtfabric"),
    ("lib-virtfabric", "/var/lib/virtfabric"),
)
"""Directories below the root, and where the sandbox has them."""

# A libvirtd that never ran asks every QEMU for what it can do: 0.5 s, but 25 s in an emulated lab.
# It checks by itself whether what it finds here still holds.
_PROBED = Path("/var/cache/libvirt/qemu/capabilities")

_LIBVIRTD_CONF = """\
host_uuid = "{host_uuid}"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0770"
log_outputs = "3:stderr"
log_filters = "4:util.virnetdev 4:node_device"
"""
# namespaces: QEMU's private /dev costs a second mount tree for each guest and hides nothing here.
# remember_owner: needs trusted xattrs on every file system that a test puts an image on.
_QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
namespaces = []
remember_owner = 0
"""
_INERT_HOOK = """\
#!/bin/sh
# Keeps hooks alive: a libvirtd that starts without any hook ignores those added later.
exit 0
"""
# Debian's system.conf without activation, syslog and its own user: same default policy, so a policy
# file has to grant here exactly what it has to grant on a real host.
_BUS_CONF = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <pidfile>/run/dbus/pid</pidfile>
  <auth>EXTERNAL</auth>
  <listen>unix:path=/run/dbus/system_bus_socket</listen>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <includedir>/usr/share/dbus-1/system.d</includedir>
  <includedir>/etc/dbus-1/system.d</includedir>
</busconfig>
"""


def write_root(root: Path, *, hooks_at_start: bool, libvirtd_conf: str, qemu_conf: str) -> None:
    """Makes `root` anew; the arguments are those of `Sandbox`."""
    for directory, _ in BINDS:
        shutil.rmtree(root / directory, ignore_errors=True)
        (root / directory).mkdir(parents=True)
    conf = root / "etc-libvirt"
    host = _LIBVIRTD_CONF.format(host_uuid=uuid.uuid4())
    (conf / "libvirtd.conf").write_text(host + libvirtd_conf)
    (conf / "qemu.conf").write_text(_QEMU_CONF + qemu_conf)
    (conf / "qemu" / "networks" / "autostart").mkdir(parents=True)
    if hooks_at_start:
        (conf / "hooks" / "qemu.d").mkdir(parents=True)
        hook = conf / "hooks" / "qemu.d" / "00-inert"
        hook.write_text(_INERT_HOOK)
        hook.chmod(0o755)
    (root / "bus.conf").write_text(_BUS_CONF)
    if _PROBED.is_dir():
        shutil.copytree(_PROBED, root / "cache-libvirt" / "qemu" / "capabilities")
    for log in ("init.log", "bus.log", "libvirtd.log"):
        (root / log).write_text("")
