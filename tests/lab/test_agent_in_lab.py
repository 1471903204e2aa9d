"""The agent's integration tests, once more, on a host of two nodes with SMT, cgroup v2 and KVM."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running_lab import RunningLab

FILES = (
    "test_nodes_and_cores",
    "test_libvirt_adapter",
    "test_demo_judged",
    "test_lifecycle",
    "test_two_agents",
    "test_reactions",
    "test_jobs",
    "test_marked_pins",
    "test_refusals",
    "test_faults",
    "test_migration",
    "test_polkit",
)
LONGEST_S = 5400
"""For a file that hangs; docs/testing.md has what they took."""


@pytest.fixture(scope="module")
def prepared(small: RunningLab) -> RunningLab:
    """Python is compiled and libvirtd knows QEMU: once, not in the first test's deadline."""
    small.run("cd /opt/virtfabric/checkout && virtfabric-python -m compileall -q virtfabric demo")
    small.run("virsh -q capabilities > /dev/null")
    return small


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", FILES)
def test_in_the_lab(prepared: RunningLab, name: str) -> None:
    words = f"-q -x --durations=5 -p no:cacheprovider tests/integration/{name}.py"
    where = "cd /opt/virtfabric/checkout"
    log = f"/var/log/{name}.log"
    said = prepared.run(
        f"{where} && timeout {LONGEST_S} virtfabric-python -m pytest {words} > {log} 2>&1; "
        f"echo ended with $? >> {log}; tail -n 200 {log}",
        timeout_s=LONGEST_S + 60,
    )
    # guests of private hosts, which nobody sees from outside
    prepared.faults.extend(re.findall(r"^emulator: (.*)$", said, re.MULTILINE))
    assert said.endswith("ended with 0"), said
    assert " passed" in said
    assert " skipped" not in said, said
