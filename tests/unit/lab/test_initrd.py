"""Which modules a lab's initrd loads: of KVM's the one for the processor, or neither."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from virtfabric.shim.lab import image, recipe

if TYPE_CHECKING:
    from pathlib import Path

ORDER = "virtio_pci.ko\nkvm.ko\nkvm_amd.ko\nkvm_intel.ko\nnvme.ko\n"
CPUINFO = (
    "processor\t: 0\nmodel name\t: {name}\n"
    "flags\t\t: fpu vme {flag}lm\n{more}bugs\t\t: spectre_v1\n"
)
AMD = CPUINFO.format(name="AMD EPYC", flag="svm ", more="")
INTEL = CPUINFO.format(name="Intel Xeon", flag="vmx ", more="vmx flags\t: vnmi ept\n")
AMD_FLAT = CPUINFO.format(name="AMD svm EPYC", flag="svm_lock vmxnet ", more="")


@pytest.fixture
def busybox() -> str:
    found = shutil.which("busybox")
    if found is None:
        pytest.skip("no busybox here")
    return found


@pytest.mark.parametrize(
    ("cpuinfo", "kvm"),
    [
        (AMD, ["kvm_amd.ko"]),
        (INTEL, ["kvm_intel.ko"]),
        (INTEL + "\n" + INTEL, ["kvm_intel.ko"]),
        (AMD_FLAT, []),
        (INTEL.replace("vmx lm", "lm vmx").replace("vmx flags", "x86 flags"), ["kvm_intel.ko"]),
    ],
)
@pytest.mark.parametrize("init", ["initrd-init", "box/initrd-init"])
def test_kvms_module_is_the_processors(
    tmp_path: Path, busybox: str, init: str, cpuinfo: str, kvm: list[str]
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    (tmp_path / "order").write_text(ORDER)
    (tmp_path / "load-modules").write_text(_here(tmp_path, "load-modules"))
    # what of PID 1 comes before the disks, on a machine where KVM's modules load nowhere
    head = _here(tmp_path, init).partition("if ! mount")[0].splitlines()
    fake = 'insmod() { echo "$1"; }; mount() { :; }\n'
    script = fake + "\n".join(line for line in head if "--install" not in line)
    done = subprocess.run([busybox, "sh"], input=script, capture_output=True, text=True, check=True)
    loaded = [line.rpartition("/")[2] for line in done.stdout.splitlines()]
    assert loaded == ["virtio_pci.ko", "kvm.ko", *kvm, "nvme.ko"]
    assert done.stderr == ""


def _here(directory: Path, name: str) -> str:
    text = recipe.read_file(name).replace("/proc/cpuinfo", f"{directory}/cpuinfo")
    text = text.replace("/modules/order", f"{directory}/order")
    return text.replace(". /load-modules", f". {directory}/load-modules")


@pytest.mark.parametrize("name", ["initrd-init", "box/initrd-init", *recipe.INITRD_FILES])
def test_the_initrds_scripts_are_shell(busybox: str, name: str) -> None:
    subprocess.run([busybox, "sh", "-n"], input=recipe.read_file(name), text=True, check=True)


def test_both_of_kvms_modules_are_there_to_choose_from() -> None:
    assert {"kvm_amd", "kvm_intel"} <= {*recipe.INITRD_MODULES}
    members = image._initrd_members("", b"", {"kvm_amd.ko": b""})
    assert {"load-modules", "modules/kvm_amd.ko"} <= {name for name, _, _ in members}
