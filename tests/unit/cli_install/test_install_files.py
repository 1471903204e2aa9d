"""install, uninstall and hooks: into a directory of our own, twice, and gone again."""

import io
import json
import os
import re
import stat
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from lxml import etree

from virtfabric.cli.hooks import DaemonStart, check_noticed, read_daemons, read_status
from virtfabric.cli.main import main
from virtfabric.config import Config, load_config
from virtfabric.daemon.authority import Action

HOOK = "etc/libvirt/hooks/qemu.d/50-virtfabric"
CONFIG = "etc/virtfabric/virtfabric.toml"


def run(*argv):
    out = io.StringIO()
    with redirect_stdout(out):
        code = main([*map(str, argv), "--json"])
    return code, json.loads(out.getvalue())


def outcomes(document):
    return {f["outcome"] for f in document["files"]}


def files(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_twice_and_gone(tmp_path):
    code, document = run("install", "--root", tmp_path)
    assert (code, outcomes(document)) == (0, {"created"})
    assert files(tmp_path) == sorted(str(Path(f["path"]).relative_to(tmp_path))
                                     for f in document["files"])  # fmt: skip
    times = {p: (tmp_path / p).stat().st_mtime_ns for p in files(tmp_path)}
    code, document = run("install", "--root", tmp_path)
    assert (code, outcomes(document)) == (0, {"unchanged"})
    assert times == {p: (tmp_path / p).stat().st_mtime_ns for p in files(tmp_path)}
    code, document = run("uninstall", "--root", tmp_path)
    assert (code, outcomes(document)) == (0, {"removed"})
    assert list(tmp_path.iterdir()) == []
    code, document = run("uninstall", "--root", tmp_path)
    assert (code, outcomes(document)) == (0, {"absent"})


def test_modes_do_not_depend_on_umask(tmp_path):
    old = os.umask(0o077)
    try:
        run("install", "--root", tmp_path)
    finally:
        os.umask(old)
    modes = {p: stat.S_IMODE((tmp_path / p).stat().st_mode) for p in files(tmp_path)}
    assert modes.pop(HOOK) == 0o755
    assert set(modes.values()) == {0o644}


def test_an_edited_configuration_stays(tmp_path):
    run("install", "--root", tmp_path)
    (tmp_path / CONFIG).write_text('[agent]\nlog_level = "debug"\n')
    for command in ("install", "uninstall"):
        _, document = run(command, "--root", tmp_path)
        kept = [f["path"] for f in document["files"] if f["outcome"] == "kept"]
        assert kept == [str(tmp_path / CONFIG)]
    assert files(tmp_path) == [CONFIG]
    assert load_config(tmp_path / CONFIG).agent.log_level == "debug"


def test_other_hooks_stay(tmp_path):
    other = tmp_path / "etc/libvirt/hooks/qemu.d/10-mine"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    _, document = run("hooks", "install", "--root", tmp_path, "--socket", "/run/x/h.sock")
    assert document["others"] == [str(other)]
    assert document["socket"] == "/run/x/h.sock"
    assert 'SOCKET = "/run/x/h.sock"' in (tmp_path / HOOK).read_text()
    assert run("hooks", "status", "--root", tmp_path)[0] == 0
    run("hooks", "uninstall", "--root", tmp_path)
    assert files(tmp_path) == ["etc/libvirt/hooks/qemu.d/10-mine"]
    code, document = run("hooks", "status", "--root", tmp_path)
    assert (code, document["installed"]) == (1, False)


def test_an_old_hook_is_not_current(tmp_path):
    run("hooks", "install", "--root", tmp_path)
    with (tmp_path / HOOK).open("a") as hook:
        hook.write("# an older version\n")
    code, document = run("hooks", "status", "--root", tmp_path)
    assert (code, document["installed"], document["current"]) == (1, True, False)
    _, document = run("hooks", "install", "--root", tmp_path)
    assert (outcomes(document), document["current"]) == ({"updated"}, True)


@pytest.mark.parametrize("socket", ["relative", '/run/x"; import os', "/run/" + "x" * 120])
def test_a_bad_socket_is_a_usage_error(tmp_path, socket):
    code, document = run("hooks", "install", "--root", tmp_path, "--socket", socket)
    assert code == 2
    assert "--socket" in json.dumps(document["error"])
    assert files(tmp_path) == []


def test_a_path_that_is_in_the_way(tmp_path):
    (tmp_path / "etc").write_text("not a directory")
    code, document = run("install", "--root", tmp_path)
    assert code == 1
    assert str(tmp_path / "etc") in json.dumps(document["error"])


def test_shipped_files_are_well_formed(tmp_path):
    run("install", "--root", tmp_path, "--bindir", "/opt/vf/bin")
    bus = etree.parse(tmp_path / "usr/share/dbus-1/system.d/org.virtfabric1.conf")
    assert bus.xpath("//policy[@user='root']/allow/@own") == ["org.virtfabric1"]
    assert not bus.xpath("//policy[@context='default']/allow[@own]")
    actions = etree.parse(tmp_path / "usr/share/polkit-1/actions/org.virtfabric1.policy")
    assert set(actions.xpath("//action/@id")) == set(Action) - {Action.HOOK}
    unit = (tmp_path / "usr/lib/systemd/system/virtfabricd.service").read_text()
    assert "ExecStart=/opt/vf/bin/virtfabricd\n" in unit
    assert "@" not in unit


def test_the_sample_shows_valid_settings(tmp_path):
    run("install", "--root", tmp_path)
    text = (tmp_path / CONFIG).read_text()
    assert load_config(tmp_path / CONFIG) == Config()
    # Whatever is commented out must work once the mark is removed.
    live = re.sub(r"^# (\[|[a-z_0-9]+ = )", r"\1", text, flags=re.MULTILINE)
    live = live.replace('memory = "8GiB" ', "#")
    shown = tmp_path / "shown.toml"
    shown.write_text(live)
    assert set(tomllib.loads(live)) == {
        "agent", "capacity", "memory", "access", "cards", "device",
    }  # fmt: skip
    config = load_config(shown)
    assert config.capacity.memory_by_node is not None
    assert [p.user for p in config.access.principals] == ["alice"]
    assert [p.capability for p in config.pools] == ["net.vf"]
    assert [card.serial for card in config.cards.cards] == ["C-1"]


def test_restart_is_needed_only_where_no_hook_was_there():
    daemon = DaemonStart("libvirtd", 7, started=1000.0)
    assert check_noticed([900.0, 2000.0], daemon)[0] is False
    needed, why = check_noticed([2000.0], daemon)
    assert needed
    assert "systemctl restart libvirtd" in why
    assert check_noticed([2000.0], None)[0] is False
    assert check_noticed([], daemon)[0] is False


def test_status_looks_at_every_hook(tmp_path):
    run("hooks", "install", "--root", tmp_path)
    early = DaemonStart("libvirtd", 7, started=0.0)
    late = DaemonStart("virtqemud", 8, started=(tmp_path / HOOK).stat().st_ctime + 10)
    assert read_status(tmp_path, [late])["restart_needed"] is False
    assert read_status(tmp_path, [late, early])["restart_needed"] is True


def test_daemons_are_found_in_proc(tmp_path):
    proc = tmp_path
    (proc / "stat").write_text("cpu 1 2\nbtime 5000\n")
    tail = " ".join(["S", *["0"] * 18, "200", "0"])
    for pid, name, namespace in ((5, "libvirtd", "a"), (6, "libvirtd", "b"), (7, "bash", "a")):
        (proc / str(pid) / "ns").mkdir(parents=True)
        (proc / str(pid) / "comm").write_text(name + "\n")
        (proc / str(pid) / "stat").write_text(f"{pid} (odd) name) {tail}\n")
        (proc / str(pid) / "ns/mnt").symlink_to(f"mnt:[{namespace}]")
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/ns/mnt").symlink_to("mnt:[a]")
    [found] = read_daemons(proc)
    assert (found.name, found.pid) == ("libvirtd", 5)
    assert found.started == 5000 + 200 / os.sysconf("SC_CLK_TCK")
