"""What doctor says of IOMMU, vfio-pci, pools, quarantine and ports."""

import pytest

from virtfabric.cli.devicechecks import (
    check_iommu,
    check_pools,
    check_ports,
    check_quarantine,
    check_vfio,
)
from virtfabric.cli.findings import Verdict
from virtfabric.model.device import DevicePool, Match, PciAddress

NET = DevicePool("net.vf", Match(pf=PciAddress("0000:3b:00.0")))


def function(number=1, **values):
    base = {
        "address": f"0000:3b:10.{number}", "capability": "net.vf", "holder": None,
        "quarantine": None, "obstacles": [],
    }  # fmt: skip
    return base | values


def test_no_iommu_matters_only_where_a_pool_is_configured(tmp_path):
    [off] = check_iommu(wanted=True, root=tmp_path)
    assert (off.verdict, "intel_iommu=on" in off.mend) == (Verdict.FAIL, True)
    [unused] = check_iommu(wanted=False, root=tmp_path)
    assert unused.verdict is Verdict.OK
    (tmp_path / "sys/kernel/iommu_groups/7").mkdir(parents=True)
    [on] = check_iommu(wanted=True, root=tmp_path)
    assert (on.verdict, on.detail) == (Verdict.OK, "1 groups")


def test_vfio_is_loaded_there_or_missing(tmp_path):
    [missing] = check_vfio(wanted=True, root=tmp_path, release="6.1")
    assert missing.verdict is Verdict.FAIL
    [unused] = check_vfio(wanted=False, root=tmp_path, release="6.1")
    assert unused.verdict is Verdict.OK
    modules = tmp_path / "lib/modules/6.1"
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text("kernel/drivers/vfio/pci/vfio-pci.ko.xz: x\n")
    [there] = check_vfio(wanted=True, root=tmp_path, release="6.1")
    assert (there.verdict, "loads it" in there.detail) == (Verdict.OK, True)
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
    [loaded] = check_vfio(wanted=True, root=tmp_path, release="6.1")
    assert loaded.detail == "loaded"


@pytest.mark.parametrize(
    ("functions", "verdict", "words"),
    [
        ([], Verdict.WARN, "no function of this host matches"),
        ([function(capability="other")], Verdict.WARN, "no function of this host matches"),
        ([function()], Verdict.OK, "1 functions: 0 held, 1 free"),
        ([function(holder="db")], Verdict.OK, "1 functions: 1 held, 0 free"),
        ([function(obstacles=["has no IOMMU group"])], Verdict.WARN, "has no IOMMU group"),
    ],
)
def test_pools_have_members_that_can_be_given(functions, verdict, words):
    [finding] = check_pools((NET, NET), functions)
    assert (finding.name, finding.verdict) == ("device net.vf", verdict)
    assert words in finding.detail


def test_each_function_in_quarantine_is_named_with_its_way_out():
    entry = {"why": "it could not be reset", "remedy": "virtfabric devices release X"}
    [finding] = check_quarantine([function(1), function(2, quarantine=entry)])
    assert finding.name == "quarantine 0000:3b:10.2"
    assert (finding.detail, finding.mend) == (entry["why"], entry["remedy"])


def test_guests_without_a_free_port_are_told_of():
    def guest(name, **values):
        return {"name": name, "managed": True, "state": "running", "free_ports": 2} | values

    guests = [guest("a"), guest("b", free_ports=0), guest("c", free_ports=0, managed=False)]
    [finding] = check_ports([*guests, guest("d", state="shutoff", free_ports=None)])
    assert "b has no free PCIe port" in finding.detail
    assert "virtfabric ports add b" in finding.mend
