"""The agent's integration tests, once more, on a host of two nodes with SMT, cgroup v2 and KVM."""

from __future__ import annotations

import re
import shlex
from collections import deque
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from running_lab import RunningLab

# the longest first
FILES = (
    "test_faults",
    "test_nodes_and_cores",
    "test_libvirt_adapter",
    "test_demo_judged",
    "test_lifecycle",
    "test_two_agents",
    "test_reactions",
    "test_jobs",
    "test_marked_pins",
    "test_refusals",
    "test_migration",
    "test_polkit",
)
LONGEST_S = 5400
"""For a file that hangs; docs/testing.md has what they took."""

NOTHING_LEFT = pytest.ExitCode.NO_TESTS_COLLECTED
RESULT = re.compile(r"(?P<node>tests/\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED)")
"""A test's line of `pytest -v`."""

PASSED: dict[str, list[str]] = {}
"""By file, what passed before the lab's emulator failed: a new lab goes on after it."""


@pytest.fixture(scope="module")
def prepared(small: RunningLab) -> RunningLab:
    """Python is compiled and libvirtd knows QEMU: once, not in the first test's deadline."""
    small.run("cd /opt/virtfabric/checkout && virtfabric-python -m compileall -q virtfabric demo")
    small.run("virsh -q capabilities > /dev/null")
    return small


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", FILES)
def test_in_the_lab(prepared: RunningLab, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    passed = PASSED.setdefault(name, [])
    behind = shlex.quote("\n".join(passed))
    words = f"-v -x --durations=5 -p no:cacheprovider tests/integration/{name}.py"
    said: deque[str] = deque(maxlen=200)
    for line in prepared.follow(
        "cd /opt/virtfabric/checkout && export PYTHONUNBUFFERED=1 && "
        f"VIRTFABRIC_LEAVE_OUT={behind} timeout {LONGEST_S} "
        f"virtfabric-python -m pytest {words} 2>&1; echo ended with $?"
    ):
        said.append(line)
        if result := RESULT.match(line):
            with capfd.disabled():
                print(f"\n{line}", end="", flush=True)
            if result["outcome"] == "PASSED":
                passed.append(result["node"])
        # guests of private hosts, which nobody sees from outside
        if fault := re.match("emulator: (.*)", line):
            prepared.faults.append(fault[1])
    text = "\n".join(said)
    if passed and text.endswith(f"ended with {NOTHING_LEFT:d}"):
        return  # the emulator had failed after the last one
    assert text.endswith("ended with 0"), text
    assert " passed" in text
    assert " skipped" not in text, text
