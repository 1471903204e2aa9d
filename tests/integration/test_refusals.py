"""Bad input and callers without rights: a clear error, the right exit code, nothing changed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest
from lab_host import DATABASE, Guest, LabHost

from demo.host import AGENT, CONFIG

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

FAILED, USAGE, REFUSED, UNREACHABLE = 1, 2, 3, 4
STRANGER = Guest(name="stranger", priority=None, virtio_mem=None)
IDLE = Guest(name="idle")
HOOK = "/etc/libvirt/hooks/qemu.d/50-virtfabric"
MARK = "urn:virtfabric:policy:1"
NOBODY = 65534
STRANGER_ID = 1
"""daemon: the bus turns away whom the host does not know."""
# The interpreter of a test run may lie where nobody else can read: load first, then drop root.
AS_NOBODY = f"""
import os, sys
from virtfabric.cli import main
main.build_parser()
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vfno{os.getpid()}", tmp_path_factory.mktemp("no") / "lab") as lab:
        allow_nobody(lab)
        lab.start_agent()
        lab.start_guests(DATABASE, STRANGER)
        lab.settle("database")
        lab.define(IDLE)
        lab.guests.pop("idle")  # it does not run, so there is nothing to observe
        yield lab


def allow_nobody(lab: LabHost) -> None:
    """Its group may ask, within bounds; another user may not even ask."""
    lab.config(access={"group": str(NOBODY)})
    with lab.box.path(CONFIG).open("a") as config:
        config.write('\n[[access.principal]]\nuser = "nobody"\nmax_priority = 60\nmax_cpu = "1"\n')


def look(host: LabHost) -> dict[str, object]:
    """All that a refused request could have changed."""
    ask = "; ".join(f"metadata {n} {MARK}" for n in ("database", "idle", "stranger"))
    status = host.cli_json("status")
    return {
        "guests": {n: (o.pid, *o.settings, o.current) for n, o in host.observe_all().items()},
        "policies": host.virsh(ask, check=False).stdout,
        "books": (status["grants"], status["loans"]),
        "alerts": status["alerts"],
    }


class Watch:
    """Carries what was seen from case to case: one look serves as after and as next before.

    So what changes late, or between two cases, is found as well.
    """

    def __init__(self, host: LabHost) -> None:
        self._host = host
        self._seen = look(host)

    def expect_unchanged(self) -> None:
        """Asserts that all is as it was at the last look."""
        before, self._seen = self._seen, look(self._host)
        assert self._seen == before
        assert self._host.agent is not None
        assert self._host.agent.poll() is None


@pytest.fixture(scope="module")
def watch(host: LabHost) -> Watch:
    found = Watch(host)
    assert str(found._seen["policies"]).count("</policy>") == 2, "database and idle have one"
    return found


@pytest.fixture
def unchanged(watch: Watch) -> Iterator[None]:
    yield
    watch.expect_unchanged()


def test_the_watch_sees_a_change(host: LabHost, watch: Watch) -> None:
    """One by somebody else, and its end: else no other test here could fail."""
    for cpus in ("0", "0-1"):
        host.virsh("vcpupin", "stranger", "0", cpus, "--live")
        with pytest.raises(AssertionError):
            watch.expect_unchanged()
    watch.expect_unchanged()


def expect(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    for word in words:
        assert word in said
    assert "Traceback" not in said


WRONG: list[tuple[str, int, tuple[str, ...]]] = [
    ("allocate nobody --cpu +1", REFUSED, ("unknown-guest", "nobody")),
    ("allocate stranger --cpu +1", REFUSED, ("unmanaged-guest", "stranger")),
    ("allocate idle --cpu +1", REFUSED, ("not-running", "idle")),
    ("allocate database --memory 12X", USAGE, ("--memory", "12X")),
    ("allocate database --memory +", USAGE, ("--memory",)),
    ("allocate database --cpu nan", USAGE, ("--cpu", "nan")),
    ("allocate database --cpu +0", USAGE, ("--cpu", "+0", "changes nothing")),
    ("allocate database --cpu 0", REFUSED, ("below-floor", "database")),
    ("allocate database --cpu -99", REFUSED, ("below-floor", "database")),
    ("allocate database --memory -99G", REFUSED, ("below-floor", "database")),
    ("allocate database --cpu +99", REFUSED, ("above-limit", "database")),
    ("allocate database --cpu +99999", USAGE, ("--cpu", "99999")),
    ("allocate database --memory +1000T", REFUSED, ("above-limit", "database")),
    ("allocate database --memory 99999999999999999999T", USAGE, ("--memory",)),
    ("allocate database", USAGE, ("--cpu", "--memory")),
    ("allocate database --cpu +100m --for yesterday", USAGE, ("--for", "yesterday")),
    ("allocate database --cpu +100m --for 0s", USAGE, ("--for", "0s")),
    ("allocate database --cpu +100m --deadline 1h", USAGE, ("deadline", "1h", "10 minutes")),
    ("policy set database --cpu 4:1", USAGE, ("cpu.limit", "below the reservation")),
    ("policy set database --memory 4G:1G", USAGE, ("memory.limit", "below the reservation")),
    ("policy set database --priority 101", USAGE, ("priority", "101")),
    ("policy set database --priority high", USAGE, ("priority", "high")),
    ("policy set database --shares 0", USAGE, ("shares", "0")),
    ("policy set database --placement nowhere", USAGE, ("--placement", "nowhere")),
    ("policy set database", USAGE, ("--priority",)),
    ("policy set nobody --priority 5", REFUSED, ("unknown-guest", "nobody")),
    ("release grant-none", REFUSED, ("unknown-id", "grant-none")),
    ("explain req-none", REFUSED, ("unknown-id", "req-none")),
    ("audit --since yesterday", USAGE, ("--since", "yesterday")),
    ("frobnicate", USAGE, ("frobnicate",)),
    ("--bus unix:path=/nowhere status", UNREACHABLE, ("/nowhere",)),
]


@pytest.mark.usefixtures("unchanged")
def test_bad_requests(host: LabHost) -> None:
    """One table, one look before and after: what is wrong is told by line."""
    problems = []
    for line, code, words in WRONG:
        try:
            expect(host.cli(*line.split()), code, *words)
        except AssertionError as error:
            problems.append(f"{line}: {str(error).splitlines()[0]}")
    assert not problems, "\n".join(problems)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "arguments", ["string:database string:cpu", "string:database", "int32:1 string:x", ""]
)
def test_wrong_types_on_the_bus(host: LabHost, arguments: str) -> None:
    send = ["dbus-send", "--system", "--print-reply", "--dest=org.virtfabric1"]
    call = ["/org/virtfabric1", "org.virtfabric1.Manager.Allocate", *arguments.split()]
    done = host.box.run([*send, *call], check=False)
    assert done.returncode != 0
    assert "org.freedesktop.DBus.Error.InvalidArgs" in done.stderr


CONFIGS = [
    ("[capacity]\ncpuz = '0-1'", ("capacity.cpuz", "0-1", "did you mean cpus")),
    ("[capacity]\nmemory = 'lots'", ("capacity.memory", "lots")),
    ("[capacity]\ncpus = '0-x'", ("capacity.cpus", "0-x")),
    ("[memory]\ndeadline_s = -1", ("memory.deadline_s", "-1")),
    ("[agent]\nlog_level = 'loud'", ("agent.log_level", "loud")),
    ("[shed]\nbikes = 3", ("shed",)),
    ("[capacity", ("not TOML",)),
]


@pytest.mark.parametrize(("text", "words"), CONFIGS)
def test_wrong_configuration(host: LabHost, text: str, words: tuple[str, ...]) -> None:
    host.box.path("/etc/virtfabric/wrong.toml").write_text(text)
    try:
        command = [*AGENT, "--check-config", "--config", "/etc/virtfabric/wrong.toml"]
        expect(host.box.run(command, check=False, env=host.env), FAILED, "wrong.toml", *words)
    finally:
        host.box.path("/etc/virtfabric/wrong.toml").unlink()


# -- the hook -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("words", "stdin", "code", "line"),
    [
        ("", "", 1, "usage"),
        ("database", "", 1, "usage"),
        ("database prepare begin - more", "", 1, "usage"),
        ("database dance begin -", "", 0, ""),
        ("database prepare begin -", "garbage", 0, ""),
        ("database prepare begin -", f"garbage {MARK} <<<&", 1, "domain XML"),
        ("database prepare begin -", f"<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/shadow'>]>"
         f"<domain><name>&e;</name><!--{MARK}--></domain>", 1, "virtfabric"),
        ("database release end -", f"garbage {MARK}", 0, ""),
        ("database reconnect begin -", f"garbage {MARK}", 0, ""),
    ],
)  # fmt: skip
def test_hook_by_hand(host: LabHost, words: str, stdin: str, code: int, line: str) -> None:
    done = host.box.run([HOOK, *words.split()], check=False, stdin=stdin)
    assert done.returncode == code, done.stderr
    assert line in done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stderr
    assert "root:" not in done.stderr, "an entity was resolved"


SPEAK = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as agent:
    agent.settimeout(5 * float(os.environ.get("VIRTFABRIC_PATIENCE", "1")))
    agent.connect("/run/virtfabric/hook.sock")
    if sys.argv[1]:
        agent.sendall(sys.argv[1].encode())
        agent.shutdown(socket.SHUT_WR)
    print(b"".join(iter(lambda: agent.recv(4096), b"")).decode())
"""
PYTHON = ("/usr/bin/python3", "-IS", "-c", SPEAK)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("message", ["hello\n", "VF1 prepare 9 999999999\n", "VF1 dance 0 0\n"])
def test_garbage_on_the_hook_socket(host: LabHost, message: str) -> None:
    said = host.box.run([*PYTHON, message]).stdout
    assert said.startswith("VF1 2 "), said


# -- callers without rights -----------------------------------------------------------------------


def as_nobody(host: LabHost, *words: str) -> subprocess.CompletedProcess[str]:
    return host.box.run([sys.executable, "-c", AS_NOBODY, *words], check=False, env=host.env)


def as_stranger(host: LabHost, *words: str) -> subprocess.CompletedProcess[str]:
    """A user in no group at all."""
    drop = AS_NOBODY.replace(str(NOBODY), str(STRANGER_ID))
    return host.box.run([sys.executable, "-c", drop, *words], check=False, env=host.env)


def denials(host: LabHost) -> list[dict[str, object]]:
    return [r["body"] for r in host.cli_json("audit") if r["kind"] == "access.denied"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "line",
    [
        "allocate database --cpu +100m",
        "policy set database --priority 99",
        "policy clear database",
        "release grant-none",
        "drift --repair",
        "audit",
    ],
)
def test_stranger_is_denied_and_audited(host: LabHost, line: str) -> None:
    known = len(denials(host))
    done = as_stranger(host, *line.split())
    expect(done, REFUSED, "not-allowed", f"uid {STRANGER_ID}")
    (denial,) = denials(host)[known:]
    assert denial["uid"] == STRANGER_ID


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "line", ["policy set database --priority 95", "allocate database --cpu +700m"]
)
def test_ceiling_is_kept_and_audited(host: LabHost, line: str) -> None:
    known = len(denials(host))
    expect(as_nobody(host, *line.split()), REFUSED, "above-ceiling", "nobody")
    (denial,) = denials(host)[known:]
    assert denial["uid"] == NOBODY


def test_stranger_may_look(host: LabHost) -> None:
    assert as_stranger(host, "guests").returncode == 0


@pytest.mark.usefixtures("unchanged")
def test_hook_socket_takes_root_only(host: LabHost) -> None:
    known = len(denials(host))
    drop = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    said = host.box.run([*drop, *PYTHON, ""], check=False)
    assert "root only" in said.stdout + said.stderr
    (denial,) = denials(host)[known:]
    assert denial["uid"] == NOBODY
