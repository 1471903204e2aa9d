"""The command as users run it: a process beside an agent on a real bus."""

from __future__ import annotations

import json
import select
import signal
import time

import pytest

from virtfabric.cli.arguments import DEVICE_WANT
from virtfabric.cli.main import main
from virtfabric.cli.policy import DEVICE_WISH
from virtfabric.dbus.client import AgentClient


@pytest.fixture
def inside(served, capsys):
    """The command in this process: quicker where no signal or pipe is at stake."""

    def run(*args):
        code = main(["--bus", served.address, *args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["status"], ["capacity: CPU 4, 1 free", "db (vCPU 0-1)", "batch", "alert: a thing"]),
        (["guests"], ["1 / 2 / 4", "512MiB / 1GiB / 4GiB", "db"]),
        (["host"], ["host h1", "siblings", "unmanaged guests running: legacy"]),
        (["grants"], ["g1", "cpu 1", "2023-11-14"]),
        (["loans"], ["batch", "db", "cpu 1"]),
        (["policy", "show", "db"], ["priority 90", "reservation 1, limit 4", "limit -"]),
        (["ports", "db"], ["now: 2 ports, 1 free", "next boot", "hostdev 0000:3b:10.1"]),
        (["ports", "add", "db", "--count", "2"], ["db: 2 root ports added", "a reboot is too"]),
        (["explain", "r1"], ["root asked", "batch paid"]),
        (["audit"], ["request.granted"]),
        (["audit", "--verify"], ["the chain of 1 records is whole"]),
        (["drift"], ["vcpu 0 affinity", "0-3"]),
        (["jobs"], ["jobs"]),
        (["devices"], ["0000:3b:10.1", "quarantined", "it could not be reset; power cycle it"]),
        (["devices", "--tree"], ["0000:3b:10.1  Ethernet", "[net.vf]"]),
        (
            ["memory"],
            [
                "0x150000000",
                "8 x 2MiB, 3 free (1 promised), 4 made for db",
                "by hand",
                "problem: memdev 0x100",
                "quarantine: memdev 0x100 is poisoned: 64B at 0x0; to do: when it is sane",
            ],
        ),
        (["cards"], ["C-1", "connected", "6 of 8", "crypto.aes 3 of 4"]),
        (["card", "show", "C-1"], ["generation 7", "measured, adapter: cores 6", "C-1/slice-1"]),
        (["card", "trust", "C-1"], ["card C-1 is trusted anew: connected"]),
        (["slices"], ["C-1/slice-1", "2 cores, 1GiB, x4, 1 crypto.aes", "db", "ready, aes-1"]),
        (["memory", "--tree"], ["host bridge port1", "└─ 0x100  mem0", "1 poisoned"]),
    ],
)
def test_reading_commands_print_text_and_json(inside, command, words):
    code, out, err = inside(*command)
    assert (code, err) == (0, "")
    assert [w for w in words if w not in out] == []
    assert "\x1b" not in out  # plain text in a pipe
    code, out, _ = inside(*command, "--json")
    assert code == 0
    json.loads(out)


@pytest.mark.parametrize(
    ("words", "expected", "problem"),
    [
        (["ports", "add", "db", "--count", "0"], 2, "is not at least 1"),
        (["ports", "add", "db", "--count", "-3"], 2, "is not at least 1"),
        (["ports", "add", "db", "--count", "9"], 3, "9 more root ports do not fit"),
        (["ports", "add", "nobody", "--count", "1"], 3, "nobody"),
    ],
)
def test_ports_that_cannot_be_added(inside, words, expected, problem):
    code, _, err = inside(*words)
    assert code == expected
    assert problem in err


@pytest.mark.parametrize(
    "words",
    [["add", "db"], ["db", "--count", "1"], ["add", "db", "web", "--count", "1"], ["db", "web"]],
)
def test_ports_said_wrongly_is_usage(inside, words):
    with pytest.raises(SystemExit) as ended:
        inside("ports", *words)
    assert ended.value.code == 2


SLICES = "version = 1\n[[slice]]\ncores = 1\n"


def test_slices_are_made_and_ended(inside, tmp_path):
    file = tmp_path / "aes.toml"
    file.write_text(SLICES)
    code, out, _ = inside("slice", "create", str(file), "--for", "db")
    assert code == 0
    assert out.splitlines() == ["slice aes: C-1/slice-1", "  step: card C-1: grant slice aes"]
    assert inside("slice", "create", str(file), "--dry-run")[0] == 0
    code, out, _ = inside("slice", "destroy", "aes")
    assert (code, out) == (0, "slice aes is gone\n")
    assert inside("slice", "destroy", "aes", "--dry-run", "--json")[0] == 0


def test_a_slice_is_programmed(inside, tmp_path):
    code, out, _ = inside("card", "program", "aes", str(tmp_path / "aes.img"))
    assert code == 0
    assert out == f"slice aes runs image {tmp_path}/aes.img\n"


@pytest.mark.parametrize(
    ("words", "expected", "problem"),
    [
        (["card", "show", "C-9"], 3, "there is no card 'C-9'"),
        (["slice", "create", "/nowhere/x.toml"], 2, "cannot be read: No such file"),
    ],
)
def test_what_is_wrong_with_cards_is_said(inside, words, expected, problem):
    code, _, err = inside(*words)
    assert code == expected
    assert problem in err


def test_json_is_the_agents_own_document(inside):
    document = json.loads(inside("--json", "status")[1])
    assert document == json.loads(inside("status", "--json")[1])
    assert document["host"]["host_id"] == "h1"
    assert document["generation"] == 17


def test_allocate_shows_what_changed_and_who_paid(inside):
    code, out, _ = inside("allocate", "db", "--cpu", "+1")
    assert code == 0
    assert "db: cpu 1" in out
    assert "grant g1" in out
    assert "batch paid cpu 1" in out
    document = json.loads(inside("allocate", "db", "--cpu", "+1", "--json")[1])
    assert (document["state"], document["result"]["grant"]) == ("done", "g1")


def test_dry_run_prints_the_steps(inside):
    code, out, _ = inside("allocate", "db", "--cpu", "+1", "--dry-run")
    assert code == 0
    assert "1. batch: cap at 1 CPU" in out
    assert "batch would pay cpu 1" in out
    assert json.loads(inside("allocate", "db", "--cpu", "+1", "--dry-run", "--json")[1])["steps"]


@pytest.mark.parametrize(
    "wants",
    [["--cpu", "-1"], ["--memory", "-64M"], ["--cpu", "-0.5", "--memory", "-1G"], ["--cpu=-500m"]],
)
def test_amounts_below_zero_are_amounts(inside, wants):
    assert inside("allocate", "db", *wants)[0] == 0


@pytest.mark.parametrize(
    ("given", "key", "want"),
    [
        ("net.vf", "device:net.vf", "+1"),
        ("net.vf:2", "device:net.vf", "2"),
        ("net.vf:-1", "device:net.vf", "-1"),
        ("storage.nvme:+3", "device:storage.nvme", "+3"),
    ],
)
def test_devices_are_wants_like_any_other(given, key, want):
    assert DEVICE_WANT(given) == (key, want)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ("net.vf", "device:net.vf", "1"),
        ("net.vf:2", "device:net.vf", "2"),
        ("net.vf:0", "device:net.vf", "0"),
        ("net.vf:kept", "device:net.vf", "kept"),
        ("storage.nvme:3:reclaimable", "device:storage.nvme", "3:reclaimable"),
    ],
)
def test_devices_are_fields_of_a_policy(given, key, value):
    assert DEVICE_WISH(given) == (key, value)


def test_a_policy_with_devices_is_set_and_shown_before(inside):
    code, out, _ = inside("policy", "set", "db", "--device", "net.vf:2", "--device", "crypto.aes")
    assert (code, "placement: done" in out) == (0, True)
    code, out, _ = inside("policy", "set", "db", "--device", "net.vf:2:reclaimable", "--dry-run")
    assert code == 0
    assert "db: priority 90" in out
    assert "note: a note" in out
    assert "1. batch: cap at 1 CPU" in out
    assert "placement: done" not in out
    out = inside("policy", "set", "db", "--priority", "80", "--dry-run")[1]
    assert "db does not run: its metadata alone would be written" in out
    out = inside("policy", "set", "db", "--device", "net.vf", "--dry-run", "--json")[1]
    assert json.loads(out)["plan"]["steps"]


def test_dry_run_tells_who_shares_what(inside):
    code, out, _ = inside("allocate", "db", "--device", "net.vf", "--dry-run")
    assert code == 0
    assert "db would get 0000:3b:10.1 (net.vf)" in out
    assert "shares the group with 0000:3b:10.2 (batch)" in out


def test_a_function_leaves_quarantine(inside):
    code, out, _ = inside("devices", "release", "3b:10.1")
    assert (code, out) == (0, "0000:3b:10.1 is out of quarantine\n  step: reset\n")
    code, _, err = inside("devices", "release", "3b:10.2")
    assert code == 3
    assert "0000:3b:10.2 is not in quarantine" in err
    assert "'3b' is not a PCI address" in inside("devices", "release", "3b")[2]


def test_memory_leaves_quarantine(inside):
    code, out, _ = inside("memory", "release", "0x100")
    assert (code, out) == (0, "0x100 is out of quarantine; it was there because poisoned\n")
    code, _, err = inside("memory", "release", "node7")
    assert (code, "node7 is not in quarantine" in err) == (3, True)


def test_release_policy_and_repair_see_their_jobs_through(inside):
    assert "release of g1" in inside("release", "g1")[1]
    assert "step: pin" in inside("drift", "--repair")[1]
    code, out, _ = inside("policy", "set", "db", "--priority", "80", "--cpu", "1:4")
    assert (code, "placement: done" in out) == (0, True)
    assert inside("policy", "clear", "db")[1] == "db: unmanaged (no policy)\n"


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["allocate", "nobody", "--cpu", "1"], 3, "refused (unknown-guest)"),
        (["allocate", "db", "--cpu", "+64"], 3, "would fit: cpu 1"),
        (["policy", "set", "db", "--priority", "99"], 2, "priority: '99' is above the ceiling"),
        (["policy", "set", "db", "--priority", "101"], 2, "priority: '101'"),
        (["policy", "set", "db", "--cpu", "4:1"], 2, "cpu.limit: '1' is below the reservation"),
        (["audit", "--since", "yesterday"], 2, "--since: 'yesterday' is not a time"),
        (["allocate", "db", "--cpu", "1", "--key", "bad"], 1, "advice: ask it again"),
        (["allocate", "db", "--cpu", "1", "--key", "defect"], 1, "internal error"),
        (["explain", "defect"], 1, "internal error"),
        (["audit", "--verify", "--head", "ff"], 1, ""),
    ],
)
def test_errors_have_their_documented_exit_codes(inside, command, code, words):
    found, _, err = inside(*command)
    assert (found, words in err) == (code, True), err
    assert "Traceback" not in err
    assert "secret" not in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["allocate", "db"], "give --cpu, --memory or --device"),
        (["allocate", "db", "--cpu", "1", "--tier", "cxl"], "--tier goes with --memory"),
        (["allocate", "db", "--memory", "+2G", "--tier", "hbm"], "--tier: 'hbm' must be one of"),
        (["allocate", "db", "--device", "Net"], "'Net' is not dotted like net.vf"),
        (["allocate", "db", "--device", "net.vf:many"], "'many' must be a whole number"),
        (["allocate", "db", "--device", "net.vf:+0"], "'+0' changes nothing"),
        (["allocate", "db", "--device", "net.vf", "--device", "net.vf:2"], "one --device for each"),
        (["allocate", "db", "--cpu", "lots"], "--cpu"),
        (["allocate", "db", "--cpu", "--", "-x"], "--cpu"),
        (["allocate", "db", "--memory", "12Q"], "--memory: '12Q' is not a size"),
        (["allocate", "db", "--memory", "-99999999T"], "--memory"),
        (["allocate", "db", "--cpu", "1", "--for", "soon"], "--for"),
        (["policy", "set", "db"], "give at least one of"),
        (["policy", "set", "db", "--placement", "moon"], "--placement"),
        (["policy", "set", "db", "--device", "Net"], "'Net' is not dotted like net.vf"),
        (["policy", "set", "db", "--device", "net.vf:"], "must be a number up to 64"),
        (["policy", "set", "db", "--device", "net.vf:65"], "'65' must be a whole number"),
        (["policy", "set", "db", "--device", "net.vf:0:kept"], "0 alone removes it"),
        (["policy", "set", "db", "--device", "net.vf:2:2"], "reclaimable, kept, or both"),
        (["policy", "set", "db", "--device", "net.vf:kept:reclaimable"], "kept, or both"),
        (["policy", "set", "db", "--device", "net.vf", "--device", "net.vf:2"], "one --device for"),
        (["audit", "--head", "ff"], "--head goes with --verify"),
        (["explode"], "explode"),
        ([], "COMMAND"),
    ],
)
def test_usage_errors_name_the_field_and_end_with_2(inside, capsys, command, words):
    with pytest.raises(SystemExit) as ended:
        inside(*command)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said, said


def test_an_error_in_json_is_a_document(inside):
    code, out, _ = inside("allocate", "db", "--cpu", "+64", "--json")
    assert code == 3
    error = json.loads(out)["error"]
    assert (error["reason"], error["would_fit"]) == ("no-capacity", {"cpu": 1000})


def test_no_agent_is_exit_4_with_advice(served):
    code, out, err = served("status", bus="unix:path=/nonexistent/bus")
    assert (code, out) == (4, "")
    assert "the agent does not answer on the bus" in err
    assert "virtfabricd" in err
    assert "virtfabric doctor" in err


def _wait_for(process, condition):
    """Until the condition holds; each look is a call over the bus, which paces this."""
    give_up = time.monotonic() + 20
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < give_up, "it never came"


def _until(stream, words):
    for line in stream:
        if words in line:
            return
    raise AssertionError(f"{words!r} never came")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c_cancels_and_waits_for_the_undo(served, flags, number):
    before = _running(served)
    process = served.popen("allocate", "db", "--cpu", "+1", "--key", "slow", *flags)
    if flags:
        _wait_for(process, lambda: _running(served) - before)
    else:
        _until(process.stderr, "step ")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "cancelled, nothing changed" in err
    assert not _running(served) - before  # it waited
    if flags:
        assert json.loads(out)["error"]["reason"] == "cancelled"


def _running(served):
    with AgentClient.connected(served.address) as client:
        jobs = client.call("ListJobs")
    return {j["id"] for j in jobs if j["state"] == "running"}


def test_watch_prints_events_until_ctrl_c(served):
    process = served.popen("watch", "--json")
    _wait_for(process, lambda: _heard_of_a_grant(served, process.stdout))
    assert served("allocate", "db", "--cpu", "+1")[0] == 0  # of the first it may have missed a part
    kinds = set()
    for line in process.stdout:
        kinds.add(json.loads(line)["kind"])
        if {"grant.made", "job.done"} <= kinds:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    process.communicate()


def _heard_of_a_grant(served, stream):
    """Have something happen, and see whether it is told by now."""
    assert served("allocate", "db", "--cpu", "+1")[0] == 0
    return bool(select.select([stream], [], [], 0)[0])


def test_a_closed_pipe_is_no_traceback(served):
    process = served.popen("host", "--json")
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=20)
    process.stderr.close()
    assert "Traceback" not in err


COMMANDS = (
    "status", "guests", "host", "grants", "loans", "jobs", "policy", "allocate", "release",
    "explain", "audit", "drift", "watch", "devices", "memory",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"example:\n  virtfabric {command}" in said
    assert "--json" in said
