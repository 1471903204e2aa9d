"""The demo passes with the real agent, fails with one whose steps do nothing, leaves no trace."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from virtfabric.shim.patience import allow

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "demo" / "run.py"
NOOP = Path(__file__).with_name("noop_agent.py")


def play(*options: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH", ""))))
    return subprocess.run(
        [sys.executable, str(DEMO), *options],
        check=False,
        capture_output=True,
        text=True,
        timeout=allow(timeout_s),
        env={**os.environ, "PYTHONPATH": path},
    )


def find_traces() -> set[str]:
    """cgroups and temporary directories of demos."""
    groups = (p for p in Path("/sys/fs/cgroup").rglob("virtfabric-demo*") if p.is_dir())
    return {str(p) for p in (*groups, *Path("/tmp").glob("virtfabric-demo-*"))}


def act_of(output: str) -> dict[int, list[str]]:
    """Lines of each act, by its number."""
    acts: dict[int, list[str]] = {}
    current = 0
    for line in output.splitlines():
        head, _, _ = line.partition(". ")
        if head.isdigit():
            current = int(head)
        acts.setdefault(current, []).append(line)
    return acts


def test_checker_imports_nothing_of_ours() -> None:
    tree = ast.parse((REPO / "demo" / "checker.py").read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names.add(node.module or "")
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", "") or getattr(node.func, "attr", "")
            assert called not in {"__import__", "import_module", "exec", "eval"}
    roots = {name.partition(".")[0] for name in names}
    assert roots <= sys.stdlib_module_names


@pytest.mark.timeout(300)
def test_demo_passes_and_leaves_no_trace(needs_root: None) -> None:
    before = find_traces()
    done = play()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    last = done.stdout.strip().splitlines()[-1]
    passed, total = last.split()[0], last.split()[2]
    assert passed == total
    assert int(total) >= 40
    assert "✗" not in done.stdout
    assert find_traces() <= before


@pytest.mark.timeout(300)
def test_demo_fails_when_the_executor_does_nothing(needs_root: None) -> None:
    before = find_traces()
    noop = f"{sys.executable} {NOOP}"
    done = play("--agent-command", noop, "--keep-going", "--patience", "4")
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    assert "broke off" not in done.stdout, done.stdout
    acts = act_of(done.stdout)
    # All but the refused request (nothing should happen, nothing does) and the story.
    for act in (1, 2, 4, 5, 6):
        assert any("✗" in line for line in acts[act]), f"act {act} believed an idle agent"
    assert find_traces() <= before


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_no_trace(needs_root: None, number: signal.Signals) -> None:
    before = find_traces()
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH", ""))))
    demo = subprocess.Popen(
        [sys.executable, str(DEMO)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert demo.stdout is not None
    with demo.stdout:
        for line in demo.stdout:
            if "virsh start batch" in line:
                demo.send_signal(number)
                break
        demo.stdout.read()
    assert demo.wait(allow(60)) != 0
    assert find_traces() <= before
