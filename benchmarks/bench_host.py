"""Benchmarks on a real private host: the allocate path, the hook, the agent at rest."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import libvirt

from demo.host import Guest, Host

ROUNDS = 12
ROUNDS_OF_HOOK = 60
WATCH_S = 60.0
"""Two drift rounds of the default interval, which are part of what an agent at rest does."""
RAW = Path(__file__).with_name("inside_raw.py")
CALLS = Path(__file__).with_name("inside_calls.py")
CONFIG = {
    "capacity": {"cpus": "0-1", "memory": "3GiB", "reserve": "32MiB", "overhead": "16MiB"},
}


def _row(what: str, value: float, unit: str, target: float) -> dict[str, Any]:
    return {
        "what": what, "value": round(value, 3), "unit": unit, "target": target,
        "met": value <= target,
    }  # fmt: skip


def measure_allocate() -> list[dict[str, Any]]:
    """`allocate` of +1 CPU with re-pinning and +64 MiB against the same raw libvirt calls."""
    guest = Guest(
        name="grower", priority=90, cpu="500m:2", virtio_mem=256, max_vcpus=2, placement="shared"
    )
    with Host("bench-allocate") as host:
        host.write_config(CONFIG)
        host.define(guest)
        host.start_guest(guest.name)
        host.wait_ready(guest.name)
        host.start_agent()
        ours = json.loads(
            host.box.run([sys.executable, str(CALLS), guest.name, str(ROUNDS)], env=host.env).stdout
        )
        host.kill_agent(signal.SIGTERM)
        raw = json.loads(
            host.box.run([sys.executable, str(RAW), guest.name, str(ROUNDS)], env=host.env).stdout
        )
    ratio = statistics.median(ours["took"]) / statistics.median(raw)
    own = statistics.median(ours["agent"]) * 1e3
    return [
        _row("allocate: the agent's own part", own, "ms median", 15.0),
        _row("allocate, D-Bus call to verified, against raw libvirt calls", ratio, "x", 1.5),
    ]


def measure_hook() -> list[dict[str, Any]]:
    """The hook against `python3 -IS` with an empty script, inside the host, agent answering."""
    guest = Guest(name="managed", priority=50, virtio_mem=64)
    plain = Guest(name="plain", priority=None, virtio_mem=64)
    with Host("bench-hook") as host, tempfile.TemporaryDirectory() as scratch:
        host.write_config(CONFIG)
        host.start_agent()
        xml = {}
        for one in (guest, plain):
            host.define(one)
            xml[one.name] = host.virsh("dumpxml", one.name).stdout
        empty = Path(scratch) / "empty.py"
        empty.write_text("")
        hook = "/etc/libvirt/hooks/qemu.d/50-virtfabric"
        script = f"""
import json, statistics, subprocess, time
xml = json.loads({json.dumps(json.dumps(xml))})
calls = [(["/usr/bin/python3", "-IS", {str(empty)!r}], "")]
calls += [([{hook!r}, name, "prepare", "begin", "-"], xml[name]) for name in ("plain", "managed")]
took = [[] for _ in calls]
for _ in range({ROUNDS_OF_HOOK}):
    for samples, (argv, text) in zip(took, calls):  # in turn: a noisy second hits all alike
        began = time.perf_counter()
        subprocess.run(argv, input=text, text=True, capture_output=True, check=True)
        samples.append(time.perf_counter() - began)
base, plain, managed = map(statistics.median, took)
print(json.dumps([plain / base, managed / base]))
"""
        ratios = json.loads(host.box.run(["/usr/bin/python3", "-c", script]).stdout)
    return [
        _row("hook, unmanaged guest, against an empty python3 -IS", ratios[0], "x", 1.5),
        _row("hook, managed guest, agent answering", ratios[1], "x", 2.0),
    ]


def measure_rest(
    managed: int = 20, unmanaged: int = 30, watch_s: float = WATCH_S
) -> list[dict[str, Any]]:
    """The agent beside 50 guests, at the default intervals.

    The guests are real QEMU processes, but paused: as many that run under TCG would keep two cores
    busy by themselves. No more than 20 are managed, since a guest's least CPU is 100m and there
    are two pCPUs; the others are read and counted in each round.
    """
    count = managed + unmanaged
    with Host("bench-rest") as host:
        host.write_config(
            {
                "capacity": CONFIG["capacity"] | {"memory": "8GiB"},
                "agent": {"sample_interval_s": 1.0, "drift_interval_s": 30.0},
            }
        )
        host.start_agent()
        for number in range(count):
            guest = Guest(
                name=f"g{number}",
                priority=50 if number < managed else None,
                cpu="100m:100m",
                memory=96,
                reserve=96,
                virtio_mem=None,
            )
            host.define(guest)
            host.virsh("start", "--paused", guest.name)
        host.wait(lambda: _is_at_rest(host, managed, count), "all are placed", timeout_s=120)
        assert host.agent is not None
        began, at = _cpu_s(host.agent.pid), time.monotonic()
        # the measurement is the passing of time itself
        subprocess.run(["sleep", str(watch_s)], check=True)
        share = (_cpu_s(host.agent.pid) - began) / (time.monotonic() - at) * 100
        rss_mb = _rss_mb(host.agent.pid)
        assert _is_at_rest(host, managed, count), "somebody stirred meanwhile"
    what = f"agent at rest, {count} guests ({managed} managed)"
    return [
        _row(f"{what}: RSS", rss_mb, "MB", 70.0),
        _row(f"{what}: CPU", share, "% of a core", 1.0),
    ]


def _is_at_rest(host: Host, managed: int, count: int) -> bool:
    """All guests have a QEMU, the managed ones are placed, and no plan is under way."""
    status = host.cli_json("status")
    there = [g for g in status["guests"] if g["state"] == "paused"]
    placed = [g for g in there if g["cpu"]["grant"] and not g["busy"]]
    running = [job for job in host.cli_json("jobs") if job["state"] == "running"]
    return (len(there), len(placed), running, status["alerts"]) == (count, managed, [], [])


def _cpu_s(pid: int) -> float:
    """Seconds of CPU that all threads of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmRSS"))
    return int(kib) / 1024


def libvirt_version() -> str:
    """Of the client library, for the report."""
    number = libvirt.getVersion()
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
