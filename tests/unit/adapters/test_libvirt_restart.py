"""Which nodes libvirt knows, and the command that makes it learn of others."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest

from virtfabric.adapters.libvirt.reader import LibvirtHost
from virtfabric.adapters.libvirt.restart import CommandRestarter
from virtfabric.adapters.sysfs import Sysfs
from virtfabric.model.errors import HypervisorError

CAPABILITIES = """<capabilities><host><uuid>00000000-0000-4000-8000-000000000001</uuid><topology>
  <cells num='2'>
    <cell id='0'><memory unit='KiB'>8</memory><cpus num='1'><cpu id='0'/></cpus></cell>
    <cell id='{far}'><memory unit='KiB'>8</memory><cpus num='0'/></cell>
  </cells></topology></host></capabilities>"""


class Connection:
    """Answers with other capabilities each time."""

    def __init__(self) -> None:
        self.far = 1

    @contextmanager
    def calls(self):
        yield self

    def getCapabilities(self):  # noqa: N802 - libvirt's own name
        self.far += 1
        return CAPABILITIES.format(far=self.far)


def test_known_nodes_are_the_cells_as_they_are_now():
    host = LibvirtHost(Connection(), Sysfs())
    assert host.read_known_nodes() == {0, 2}
    assert host.read_known_nodes() == {0, 3}


def test_the_command_is_run_without_a_shell(tmp_path):
    marker = tmp_path / "it ran; $HOME"
    CommandRestarter(["/usr/bin/touch", str(marker)]).restart()
    assert marker.exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["/nonexistent/systemctl"], "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('Job failed')"], "Job failed"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "exit code 3"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "not done after 0.5 s"),
    ],
)
def test_a_command_that_fails_says_why(command, words):
    with pytest.raises(HypervisorError) as caught:
        CommandRestarter(command, timeout_s=10 if "60" not in command[-1] else 0.5).restart()
    assert words in str(caught.value)
