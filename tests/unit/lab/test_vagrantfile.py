"""What the Vagrantfile itself does: read by ruby, with vagrant's words recorded and no libvirt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

VAGRANTFILE = Path(__file__).resolve().parents[3] / "vagrant" / "Vagrantfile"
AFTER_DESTROY = """\
class Anything
  def method_missing(*, **) = self
  def respond_to_missing?(*) = true
end
class Triggers < Anything
  def before(*) = nil
  def after(_) = yield(self)
  def ruby(&block) = $after_destroy = block
end
class Config < Anything
  def trigger = Triggers.new
end
module Vagrant
  def self.configure(_) = yield(Config.new)
end
load ENV["VAGRANTFILE"]
$after_destroy.call
"""


@pytest.mark.skipif(shutil.which("ruby") is None, reason="no ruby here")
@pytest.mark.parametrize("destroyed", [True, False])
def test_a_machine_that_is_not_destroyed_after_all_keeps_disks_and_settings(
    tmp_path: Path, destroyed: bool
) -> None:
    disk, settings = tmp_path / "state" / "nvme0.disk", tmp_path / "dot" / "lab" / "small.json"
    machine = tmp_path / "dot" / "machines" / "small" / "libvirt"
    virsh = tmp_path / "bin" / "virsh"
    for directory in (disk.parent, settings.parent, machine, virsh.parent):
        directory.mkdir(parents=True)
    disk.touch()
    settings.write_text(
        json.dumps(
            {"state": str(disk.parent), "driver": "qemu", "drivers": {"qemu": {}}, "box": {}}
        )
    )
    if not destroyed:  # vagrant-libvirt empties the machine's directory (clean_machine_folder.rb)
        (machine / "id").write_text("5e0a")
    virsh.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    virsh.chmod(0o755)
    subprocess.run(
        ["ruby", "-e", AFTER_DESTROY, "destroy"],
        env={
            "PATH": f"{virsh.parent}:{os.environ['PATH']}",
            "VAGRANTFILE": str(VAGRANTFILE),
            "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        },
        check=True,
        timeout=60,
    )
    left = [disk.exists(), settings.exists(), not (tmp_path / "asked").exists()]
    assert left == [not destroyed] * 3
