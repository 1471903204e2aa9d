"""The passthrough lab: VFs in IOMMU groups of their own, shared groups, and PCIe's faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from running_lab import RunningLab

VF = (
    "<hostdev mode='subsystem' type='pci' managed='yes'><source>"
    "<address domain='0x0000' bus='0x01' slot='0x10' function='0x0'/></source></hostdev>"
)
IGB = "/sys/bus/pci/devices/0000:01:00.0"


def groups(lab: RunningLab) -> dict[str, set[str]]:
    """IOMMU group -> addresses of its functions."""
    listed = lab.run(
        "for f in /sys/kernel/iommu_groups/*/devices/*; do "
        'g=${f%/devices/*}; echo "${g##*/} ${f##*/}"; done'
    )
    found: dict[str, set[str]] = {}
    for line in listed.splitlines():
        group, address = line.split()
        found.setdefault(group, set()).add(address)
    return found


def test_vfs_are_in_groups_of_their_own(passthrough: RunningLab) -> None:
    before = {address for members in groups(passthrough).values() for address in members}
    passthrough.run(f"echo 3 > {IGB}/sriov_numvfs")
    after = groups(passthrough)
    vfs = {address for members in after.values() for address in members} - before
    assert len(vfs) == 3
    for members in after.values():
        if members & vfs:
            assert len(members) == 1
    assert passthrough.run(f"ls -d {IGB}/virtfn* | wc -l") == "3"
    passthrough.run(f"echo 0 > {IGB}/sriov_numvfs")


def test_a_running_guest_gets_a_vf(passthrough: RunningLab) -> None:
    """The way that docs/lab.md takes."""
    passthrough.run(f"echo 1 > {IGB}/sriov_numvfs")
    passthrough.run("virsh -q create /opt/virtfabric/lab/guest.xml")
    passthrough.wait_for_guest("guest")
    passthrough.run(f"cat > /tmp/vf.xml <<'X'\n{VF}\nX")
    passthrough.run("virsh -q attach-device guest /tmp/vf.xml --live")
    driver = passthrough.run("readlink /sys/bus/pci/devices/0000:01:10.0/driver")
    assert driver.endswith("/vfio-pci")
    inside = passthrough.run("virsh qemu-monitor-command guest --hmp 'info pci'")
    assert "8086:10ca" in inside, inside
    passthrough.run("virsh -q destroy guest")
    passthrough.run(f"echo 0 > {IGB}/sriov_numvfs")


def test_plain_functions_share_groups_where_the_topology_says_so(passthrough: RunningLab) -> None:
    listed = passthrough.run("grep -l 0x00ff00 /sys/bus/pci/devices/*/class")
    plain = {line.split("/")[-2] for line in listed.splitlines()}
    sizes = sorted(len(members & plain) for members in groups(passthrough).values())
    assert [size for size in sizes if size > 1] == [2, 2]


def test_a_port_without_acs_is_in_one_group_with_what_is_behind_it(
    passthrough: RunningLab,
) -> None:
    port, behind = "0000:00:10.4", "0000:06:00.0"
    assert [members for members in groups(passthrough).values() if port in members] == [
        {port, behind}
    ]


def test_functions_know_their_node(passthrough: RunningLab) -> None:
    nodes = passthrough.run("cat /sys/bus/pci/devices/0000:51:00.0/numa_node")
    assert nodes == "1"


def test_nvme_gives_its_vfs(passthrough: RunningLab) -> None:
    assert passthrough.run("cat /sys/class/nvme/nvme0/device/sriov_totalvfs") == "4"


def test_a_correctable_error_is_counted(passthrough: RunningLab) -> None:
    port = "/sys/bus/pci/devices/0000:00:10.0"
    before = passthrough.run(f"cat {port}/aer_dev_correctable")
    passthrough.fault("aer-correctable", "rp0")
    passthrough.wait(f'[ "$(cat {port}/aer_dev_correctable)" != "{before}" ]')


def test_a_fatal_error_is_told(passthrough: RunningLab) -> None:
    passthrough.fault("aer-fatal", "rp1")
    passthrough.wait("dmesg | grep -qiE 'AER.*(fatal|uncorrect)'")


def test_an_nvme_that_hangs_does_not_answer(passthrough: RunningLab) -> None:
    read = "dd if=/dev/nvme0n1 of=/dev/null bs=4k count=16 iflag=direct"
    passthrough.run(read)
    passthrough.fault("device-hang", "nvme0")
    passthrough.run(f"({read}; touch /tmp/read) > /dev/null 2>&1 < /dev/null & disown")
    passthrough.wait("[ $(cat /sys/block/nvme0n1/inflight | tr -s ' ' | cut -d' ' -f2) -gt 0 ]")
    passthrough.run("read -rt 5 <> <(:); [ ! -e /tmp/read ]")
    # the driver's time-out and its reset, 30 s later, switch DMA on again
    passthrough.wait("dmesg | grep -qE 'nvme nvme0: .*(timeout|reset)'", timeout_s=120)


def test_a_function_is_taken_out(passthrough: RunningLab) -> None:
    there = "/sys/bus/pci/devices/0000:02:00.0"
    passthrough.run(f"[ -e {there} ]")
    passthrough.fault("removal", "edu0")
    passthrough.wait(f"[ ! -e {there} ]")
