"""Fixtures of tests that need a real libvirtd and real guests."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from guest_health import find_faults
from lab_host import HOSTS, LabHost

from virtfabric.shim.guestimage import GuestImage, ensure_guest_image
from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test's own time limit is a deadline like any other.

    `VIRTFABRIC_LEAVE_OUT` has a line for each test that passed in a lab which has failed since.
    """
    passed = os.environ.get("VIRTFABRIC_LEAVE_OUT", "").splitlines()
    left_out = [item for item in items if item.nodeid in passed]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        own = item.get_closest_marker("timeout")
        seconds = float(own.args[0] if own else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(allow(seconds)), append=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Look at the guests while they are there: at once after what failed."""
    report = yield
    if report.failed and call.when != "teardown":
        found = [fault for host in HOSTS for fault in find_faults(host)]
        report.sections += [("the emulator", "\n".join(found))] if found else []
    return report


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """Kernel and initrd, built once."""
    return ensure_guest_image()


@pytest.fixture(scope="session")
def needs_root(guest_image: GuestImage) -> None:
    """Skips where no namespaces can be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root: private namespaces and guests")


@pytest.fixture
def make_lab(needs_root: None, tmp_path: Path) -> Iterator[Callable[..., LabHost]]:
    """Starts private hosts, without an agent; all are torn down when the test ends."""
    made: list[LabHost] = []

    def make(**options: object) -> LabHost:
        number = len(made)
        lab = LabHost(f"vft{os.getpid()}-{number}", tmp_path / f"lab{number}", **options)  # type: ignore[arg-type]
        made.append(lab)
        lab.start()
        return lab

    yield make
    for lab in made:
        lab.stop()


@pytest.fixture
def lab(make_lab: Callable[..., LabHost]) -> LabHost:
    """A private host with a running agent and no guests."""
    lab = make_lab()
    lab.start_agent()
    return lab
