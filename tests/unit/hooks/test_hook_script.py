"""hooks/qemu as libvirt runs it: a process, against a real server or against nobody."""

import os
import socket
import statistics
import subprocess
import threading
import time

import pytest
from lxml import etree

from virtfabric.adapters.hook_socket import HookServer, read_missed_calls
from virtfabric.domxml.domain import parse_domain
from virtfabric.domxml.filter import replace_placement
from virtfabric.domxml.mark import put_mark
from virtfabric.model.errors import HypervisorError, Reason, Refusal, RefusedError
from virtfabric.model.mark import PinMark
from virtfabric.model.units import CpuSet
from virtfabric.protocol.hook import MAX_XML

UUID = "5f1a3a0e-7f57-4a53-9a7c-1d6a3d9f0a11"
POLICY = 'xmlns:virtfabric="urn:virtfabric:policy:1"'
HEAD = f"<domain>\n  <name>db</name>\n  <uuid>{UUID}</uuid>\n"
PINS = (
    "  <cputune>\n    <shares>1024</shares>\n    <vcpupin vcpu='0' cpuset='1'/>\n"
    "    <emulatorpin cpuset='0'/>\n  </cputune>\n</domain>\n"
)
MANAGED = f"{HEAD}  <metadata>\n    <virtfabric:policy {POLICY}/>\n  </metadata>\n{PINS}"
STRICT = MANAGED.replace("/>", ' admission="strict"/>', 1)
UNMANAGED = MANAGED.replace("urn:virtfabric:policy:1", "urn:somebody:else")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="the hook socket takes root only")


def quiet(done):
    return (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@as_root
def test_prepare_is_allowed(desk, agent, server):
    assert quiet(desk.call("prepare", MANAGED))
    [(operation, uid, xml, wait_s)] = agent.asked
    assert (operation, uid, xml) == ("prepare", 0, MANAGED)
    assert 0 < wait_s <= 5


@as_root
def test_refusal_is_one_line_for_virsh(desk, agent, server):
    agent.refusal = "memory is returning,\nretry"
    done = desk.call("prepare", MANAGED)
    assert done.returncode == 1
    assert done.stderr == b"memory is returning, retry\n"
    assert done.stdout == b""


@as_root
@pytest.mark.parametrize("operation", ["started", "release", "reconnect"])
def test_notifications_arrive(desk, agent, server, operation):
    assert quiet(desk.call(operation, MANAGED))
    assert agent.asked == [(operation, 0, MANAGED, "db")]


@as_root
@pytest.mark.parametrize("operation", ["migrate", "restore"])
def test_filter_replaces_the_xml_or_leaves_it(desk, agent, server, operation):
    assert quiet(desk.call(operation, MANAGED))
    agent.filtered = MANAGED.replace("cpuset='1'", "cpuset='7'")
    done = desk.call(operation, MANAGED)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, agent.filtered, b"")


@pytest.mark.parametrize("operation", ["prepare", "started", "restore", "reconnect"])
def test_unmanaged_guests_do_not_reach_the_agent(desk, agent, server, operation):
    assert quiet(desk.call(operation, UNMANAGED))
    assert agent.asked == []


@pytest.mark.parametrize("operation", ["start", "stopped", "attach", "nonsense"])
def test_other_operations_end_without_reading(desk, agent, server, operation):
    reader, writer = os.pipe()
    try:  # A pipe that nobody closes: reading it would never end.
        done = subprocess.run(
            [str(desk.script), "db", operation, "begin", "-"], stdin=reader, timeout=20, check=False
        )
        assert done.returncode == 0
    finally:
        os.close(reader)
        os.close(writer)
    assert agent.asked == []


def test_unreachable_agent_allows_and_leaves_a_mark(desk):
    assert quiet(desk.call("prepare", MANAGED))
    assert quiet(desk.call("started", MANAGED))
    assert quiet(desk.call("started", MANAGED))
    marks = read_missed_calls(desk.run_dir)
    assert [(m.key, m.operation, m.name) for m in marks] == [
        (UUID, "prepare", "db"), (UUID, "started", "db"),
    ]  # fmt: skip
    assert abs(marks[0].at - time.time()) < 60
    assert (desk.run_dir / "missed").stat().st_mode & 0o7777 == 0o700


def test_mark_of_a_guest_without_uuid_stays_in_its_directory(desk):
    xml = MANAGED.replace(f"<uuid>{UUID}</uuid>", "")
    assert quiet(desk.call("prepare", xml, argv=["../../é x", "prepare", "begin", "-"]))
    [path] = (desk.run_dir / "missed").iterdir()
    assert path.name == "%2e%2e%2f%2e%2e%2f%c3%a9%20x.prepare"
    assert read_missed_calls(desk.run_dir)[0].name == "../../é x"


def test_unreadable_marks_are_left_alone(desk):
    assert quiet(desk.call("prepare", MANAGED))
    (desk.run_dir / "missed" / "junk.prepare").write_text("what")
    assert len(read_missed_calls(desk.run_dir)) == 1


def test_strict_policy_refuses_without_the_agent(desk):
    done = desk.call("prepare", STRICT)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"agent does not answer" in done.stderr
    assert b"admission=strict" in done.stderr
    assert not (desk.run_dir / "missed").exists()
    assert quiet(desk.call("started", STRICT))


def test_strict_elsewhere_than_in_the_metadata_is_not_a_policy(desk):
    xml = MANAGED.replace("<metadata>", '<title>admission="strict"</title><metadata>')
    assert quiet(desk.call("prepare", xml))


def marked(*entries):
    """MANAGED with a mark as libvirt prints it."""
    pins = "".join(f"      <placement:{entry}/>\n" for entry in entries)
    space = 'xmlns:placement="urn:virtfabric:placement:1"'
    mark = f"    <placement:pins {space}>\n{pins}    </placement:pins>\n"
    return MANAGED.replace("  </metadata>", f"{mark}  </metadata>")


OURS = ('pin vcpu="0" cpuset="1"', 'emulator cpuset="0"')


@pytest.mark.parametrize("operation", ["migrate", "restore"])
def test_marked_pins_are_stripped_without_the_agent(desk, operation):
    xml = marked(*OURS)
    done = desk.call(operation, xml)
    expected = xml.replace("    <vcpupin vcpu='0' cpuset='1'/>\n", "")
    expected = expected.replace("    <emulatorpin cpuset='0'/>\n", "")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected, b"")


@pytest.mark.parametrize(
    "entries",
    [
        (),
        ('pin vcpu="0" cpuset="2"', 'emulator cpuset="1"'),
        ('pin vcpu="1" cpuset="1"', 'pin vcpu="3" cpuset="0"'),
        ('pin vcpu="" cpuset=""', "pin", "emulator"),
    ],
)
def test_pins_that_are_not_marked_are_the_operators(desk, entries):
    assert quiet(desk.call("restore", MANAGED))
    assert quiet(desk.call("restore", marked(*entries)))


def test_a_live_pin_of_the_operators_stays_beside_a_marked_one(desk):
    xml = marked(*OURS).replace(
        "<vcpupin vcpu='0' cpuset='1'/>", "<vcpupin vcpu='0' cpuset='0-1'/>"
    )
    done = desk.call("restore", xml)
    assert done.stdout.decode() == xml.replace("    <emulatorpin cpuset='0'/>\n", "")


def test_the_operators_pin_comes_back_where_ours_had_taken_its_place(desk):
    xml = marked('pin vcpu="0" cpuset="1" instead="1-3"')
    done = desk.call("restore", xml)
    assert done.stdout.decode() == xml.replace(
        "<vcpupin vcpu='0' cpuset='1'/>", '<vcpupin vcpu="0" cpuset="1-3"/>'
    )
    assert parse_domain(done.stdout.decode(), done.stdout.decode()).config_pins == {
        0: CpuSet((1, 2, 3))
    }


def test_what_the_agent_writes_the_script_reads(desk):
    """Script and filter share no code: without placement they must come to the same domain."""
    root = etree.fromstring(MANAGED)
    put_mark(root, PinMark.parse("0=1/1-3 emulator=0"))
    xml = etree.tostring(root, encoding="unicode")
    by_script = parse_domain(desk.call("restore", xml).stdout.decode(), None)
    by_filter = parse_domain(replace_placement(xml, None, None, None), None)
    assert by_script.vcpu_affinity == by_filter.vcpu_affinity == {0: CpuSet((1, 2, 3))}
    assert by_script.emulator_affinity == by_filter.emulator_affinity == CpuSet()


def test_refused_connection_is_unreachable(desk):
    desk.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(desk.socket))
    assert quiet(desk.call("prepare", MANAGED))
    assert desk.call("prepare", STRICT).returncode == 1


def test_silent_agent_is_given_up(desk):
    desk.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(desk.socket))
        silent.listen(4)
        began = time.monotonic()
        assert quiet(desk.call("started", MANAGED))
        assert time.monotonic() - began < 6
    assert len(read_missed_calls(desk.run_dir)) == 1


@pytest.mark.parametrize("reply", [b"", b"VF1 0", b"VF1 0 5 0\nabc", b"\0" * 99, b"VF1 9 0 0\n"])
def test_garbled_reply_is_unreachable(desk, reply):
    desk.run_dir.mkdir()
    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind(str(desk.socket))
        odd.listen(4)

        def answer():
            peer, _ = odd.accept()
            with peer:
                peer.sendall(reply)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        done = desk.call("prepare", STRICT)
        thread.join(10)
    assert done.returncode == 1
    assert b"agent does not answer" in done.stderr


@as_root
@pytest.mark.parametrize("failure", [HypervisorError("x"), ZeroDivisionError("x")])
def test_failing_agent_counts_as_unreachable(desk, agent, server, failure):
    agent.failure = failure
    assert quiet(desk.call("prepare", MANAGED))
    assert desk.call("prepare", STRICT).returncode == 1
    assert len(read_missed_calls(desk.run_dir)) == 1


@as_root
def test_refusal_as_exception_refuses(desk, agent, server):
    agent.failure = RefusedError(Refusal(Reason.NO_CAPACITY, "2 CPUs asked, 1 free"))
    done = desk.call("prepare", MANAGED)
    assert (done.returncode, done.stderr) == (1, b"2 CPUs asked, 1 free\n")


@as_root
def test_reconnect_always_succeeds(desk, agent, server):
    agent.failure = RefusedError(Refusal(Reason.NOT_ALLOWED, "no"))
    assert desk.call("reconnect", STRICT).returncode == 0
    server.close()
    assert desk.call("reconnect", STRICT).returncode == 0
    assert desk.call("reconnect", b"\0\xff" * 999).returncode == 0
    assert desk.call("reconnect", argv=["db", "reconnect"]).returncode == 0


@pytest.mark.parametrize("operation", ["prepare", "started", "restore", "release"])
@pytest.mark.parametrize("garbage", [b"", b"\0\xff\xfe<", b"<domain", b"<?xml version='9'?>" * 9])
def test_garbage_on_stdin_is_nobodys_guest(desk, operation, garbage):
    assert quiet(desk.call(operation, garbage))


@as_root
def test_garbage_that_names_a_policy_is_not_utf8(desk, agent, server):
    assert quiet(desk.call("prepare", b"\xff urn:virtfabric:policy:1"))
    assert agent.asked == []
    assert len(read_missed_calls(desk.run_dir)) == 1


def test_too_large_xml_counts_as_unreachable(desk):
    done = desk.call("prepare", STRICT + " " * MAX_XML)
    assert done.returncode == 1
    assert quiet(desk.call("prepare", MANAGED + " " * MAX_XML))


@pytest.mark.parametrize("argv", [[], ["db"], ["db", "prepare"], list("abcde")])
def test_called_by_hand_says_how(desk, argv):
    done = desk.call("", argv=argv)
    assert done.returncode == 1
    assert done.stderr.startswith(b"usage: ")
    assert done.stderr.count(b"\n") == 1


def test_full_run_directory_does_not_stop_a_guest(desk):
    desk.run_dir.write_text("a file where the directory should be")
    assert quiet(desk.call("prepare", MANAGED))


@as_root
def test_nobody_is_kept_out_by_the_kernel(desk, agent, server):
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert desk.call("prepare", STRICT, before=nobody).returncode == 1
    assert agent.asked == []


@as_root
def test_nobody_is_denied_and_reported_where_the_socket_is_open(desk, agent):
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    server = HookServer(desk.socket, agent, on_denied=agent.denied.append, mode=0o666)
    server.start()
    try:
        done = desk.call("prepare", MANAGED, before=nobody)
    finally:
        server.close()
    assert agent.asked == []
    [caller] = agent.denied
    assert (caller.uid, caller.principal.uid) == (65534, 65534)
    assert done.returncode in (0, 1)
    assert b"Traceback" not in done.stderr


@as_root
def test_cost_is_reported(desk, agent, server, record_property):
    empty = desk.directory / "empty"
    empty.write_text("#!/usr/bin/python3 -IS\n")
    empty.chmod(0o755)
    times = {"empty": [], "unmanaged": [], "managed": []}
    script = desk.script
    for _ in range(12):  # Alternating, so that noise hits all alike.
        for kind, samples in times.items():
            path = empty if kind == "empty" else script
            began = time.perf_counter()
            desk_call(path, UNMANAGED if kind == "unmanaged" else MANAGED)
            samples.append(time.perf_counter() - began)
    base = statistics.median(times["empty"])
    for kind in ("unmanaged", "managed"):
        ratio = statistics.median(times[kind]) / base
        record_property(f"{kind}_over_empty", round(ratio, 2))
        print(f"hook, {kind} guest: {ratio:.2f} times an empty python3 -IS ({base * 1e3:.1f} ms)")
    assert len(agent.asked) == 12


def desk_call(path, xml):
    subprocess.run(
        [str(path), "db", "prepare", "begin", "-"], input=xml.encode(), check=True, timeout=20,
        env={"PATH": "/usr/bin:/bin", "HOME": "/root", "LC_ALL": "C"},
    )  # fmt: skip
