"""Jobs of libvirt on a guest: a request is told `busy` meanwhile, and served when they end."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from lab_host import Guest, LabHost, checker

from virtfabric.shim.patience import allow

if TYPE_CHECKING:
    from collections.abc import Iterator

DATABASE = Guest(name="database", priority=90, cpu="300m:700m", virtio_mem=None)
DISK = "/var/lib/libvirt/disk.qcow2"
# A pull backup only offers the data: the job lasts until somebody ends it.
BACKUP = """\
<domainbackup mode='pull'>
  <server transport='unix' socket='/run/backup.sock'/>
  <disks><disk name='vda' type='file'><scratch file='/var/lib/libvirt/scratch'/></disk></disks>
</domainbackup>
"""


@pytest.fixture(scope="module")
def host(needs_root: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with LabHost(f"vfjob{os.getpid()}", tmp_path_factory.mktemp("jobs") / "lab") as lab:
        lab.start_agent()
        lab.start_guests(DATABASE)
        lab.settle()
        yield lab


@contextmanager
def backup(host: LabHost) -> Iterator[None]:
    """A backup of a small disk, ended at the end."""
    host.box.run(["qemu-img", "create", "-q", "-f", "qcow2", DISK, "16M"])
    host.box.path("/run/backup.xml").write_text(BACKUP)
    host.virsh("attach-disk", "database", DISK, "vda", "--subdriver", "qcow2", "--live")
    host.virsh("backup-begin", "database", "/run/backup.xml")
    yield
    host.virsh("domjobabort", "database")


@contextmanager
def dump(host: LabHost, *options: str) -> Iterator[None]:
    """A dump into a pipe, which nobody reads until the end: it fills, and the job stands still."""
    host.box.run(["mkfifo", "-m", "600", "/run/dump"])
    words = ["virsh", "-c", "qemu:///system", "dump", "--live", *options, "database", "/run/dump"]
    quiet = subprocess.DEVNULL
    with (
        host.box.popen(words, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE) as client,
        host.box.path("/run/dump").open("rb") as pipe,
    ):
        yield
        while pipe.read(1 << 20):
            pass
        said = client.communicate(timeout=allow(60))[1]
    assert client.returncode == 0, said
    host.box.run(["rm", "/run/dump"])


def find(host: LabHost) -> dict[str, Any]:
    return next(g for g in host.cli_json("guests") if g["name"] == "database")


@pytest.mark.parametrize("job", ["backup", "dump", "memory-only dump"])
def test_busy_while_a_job_runs(host: LabHost, job: str) -> None:
    """Exit code 3, nothing changed, and no wait for what has ended: the next request is served."""
    options = ["--memory-only"] if job == "memory-only dump" else []
    before = host.observe_all(fresh=True)
    held = find(host)["cpu"]["grant"]
    operation = job.removeprefix("memory-only ")
    with backup(host) if job == "backup" else dump(host, *options):
        host.wait(
            lambda: f"Operation:        {operation.title()}" in
            host.virsh("domjobinfo", "database", check=False).stdout, "the job runs"
        )  # fmt: skip
        done = host.cli("allocate", "database", "--cpu", "-100m")
        assert done.returncode == 3, done.stdout + done.stderr
        assert f"refused (busy): database has a job running: {operation}" in done.stderr
        assert find(host)["job"] == operation
        assert find(host)["cpu"]["grant"] == held
        assert checker.expect_quota(host.observe("database"), held)[0]
    for change, then in (("-100m", held - 100), ("+100m", held)):
        done = host.cli("allocate", "database", "--cpu", change)
        assert done.returncode == 0, done.stdout + done.stderr
        assert checker.expect_quota(host.observe("database"), then)[0]
    host.expect_same(before)
    assert find(host)["job"] is None
