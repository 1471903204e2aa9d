"""VFs: made once, set up through ip(8), and NVMe ones given queues."""

from __future__ import annotations

import errno
import json
import struct
import subprocess

import pytest
from kernel import a

from virtfabric.adapters.pci.nvmeadmin import Flexible, NvmeAdmin, Resource, Secondary
from virtfabric.adapters.pci.vfs import VfPools
from virtfabric.adapters.pci.vfsettings import SetUpVfHandler, VfSettingsFiles
from virtfabric.model.device import VfSettings
from virtfabric.model.devicesteps import SetUpVf
from virtfabric.model.errors import DeviceError, DeviceGoneError, VerificationError
from virtfabric.model.ids import GuestId

GUEST = GuestId("00000000-0000-4000-8000-000000000001")
PF, VF = a("0000:01:00.0"), a("0000:01:10.1")
ZERO = "00:00:00:00:00:00"


@pytest.fixture
def pf(machine):
    path = machine.add(
        PF, driver="igb", sriov_numvfs="0", sriov_totalvfs="7", sriov_drivers_autoprobe="1"
    )
    (path / "net" / "eth1").mkdir(parents=True)
    return machine


class TestCount:
    """`sriov_numvfs` is written from 0 only."""

    @pytest.fixture
    def pools(self, pf):
        return VfPools(pf.files, lambda _a: ())

    def test_made_once_without_the_hosts_driver(self, pf, pools):
        assert pools.ensure(PF, 3) == 3
        assert pf.files.log == ["sriov_drivers_autoprobe=0", "sriov_numvfs=3"]
        assert [pf.driver(vf) for vf in pf.files.vfs(PF).values()] == ["", "", ""]
        assert pools.ensure(PF, 3) == 3
        assert pools.ensure(PF, 5) == 3
        assert len(pf.files.log) == 2

    def test_what_the_kernel_refuses_is_told(self, pf, pools):
        pf.files.fails["sriov_numvfs"] = errno.ENOMEM
        with pytest.raises(DeviceError, match="Cannot allocate memory"):
            pools.ensure(PF, 3)

    @pytest.mark.parametrize("count", [0, -1, 8])
    def test_too_many_or_none(self, pf, pools, count):
        with pytest.raises(DeviceError, match="it can have 7"):
            pools.ensure(PF, count)
        assert pf.files.log == []

    def test_no_pf(self, pf, pools):
        other = a("0000:02:00.0")
        pf.add(other)
        with pytest.raises(DeviceError, match="is no PF"):
            pools.ensure(other, 1)
        with pytest.raises(DeviceGoneError):
            pools.ensure(a("0000:0f:00.0"), 1)


class Ip:
    """ip(8) for one PF: prints as iproute2 6.1 does, sets, and refuses what the driver has not."""

    def __init__(self, count: int, *, refuses: frozenset[str] = frozenset()) -> None:
        self.vfs = [
            {"mac": ZERO, "vlan": 0, "trust": "off", "spoofchk": "on", "max_tx_rate": 0}
            for _ in range(count)
        ]
        self.refuses = refuses
        self.sets: list[str] = []

    def __call__(self, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        if arguments == ("-json", "link", "show", "dev", "eth1"):
            return self._done(0, json.dumps([{"ifname": "eth1", "vfinfo_list": self._list()}]))
        assert arguments[:5] == ("link", "set", "dev", "eth1", "vf"), arguments
        number, word, value = arguments[5:]
        if word in self.refuses:
            return self._done(2, "", "RTNETLINK answers: Operation not supported\n")
        self.sets.append(f"{number} {word} {value}")
        self.vfs[int(number)][word] = int(value) if word in ("vlan", "max_tx_rate") else value
        return self._done(0)

    def _done(self, code: int, out: str = "", err: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess((), code, out, err)

    def _list(self) -> list[dict[str, object]]:
        return [
            {
                "vf": number, "link_type": "ether", "address": vf["mac"],
                **({"vlan_list": [{"vlan": vf["vlan"]}]} if vf["vlan"] else {}),
                **({"rate": {"max_tx": rate, "min_tx": 0}} if (rate := vf["max_tx_rate"]) else {}),
                "spoofchk": vf["spoofchk"] == "on", "link_state": "auto",
                "trust": vf["trust"] == "on", "query_rss_en": False,
            }
            for number, vf in enumerate(self.vfs)
        ]  # fmt: skip


class TestSettings:
    """`SetUpVf`."""

    @pytest.fixture
    def vfs(self, pf):
        VfPools(pf.files, lambda _a: ()).ensure(PF, 2)
        return pf

    BEFORE = VfSettings(mac=ZERO, vlan=0, trust=False, spoofchk=True, rate=0)
    AFTER = VfSettings(mac="52:54:00:00:00:01", vlan=7, trust=True, rate=100)
    STEP = SetUpVf(guest=GUEST, address=VF, before=BEFORE, after=AFTER)

    def test_there_and_back(self, vfs, context):
        ip = Ip(2)
        settings = VfSettingsFiles(vfs.files, ip)
        handler = SetUpVfHandler(settings)
        assert settings.read(VF) == self.BEFORE
        with pytest.raises(VerificationError, match=f"mac={self.AFTER.mac} expected, {ZERO} found"):
            handler.verify(self.STEP)
        for _ in range(2):
            handler.apply(self.STEP, context)
            handler.verify(self.STEP)
        assert ip.sets == [
            "1 mac 52:54:00:00:00:01", "1 vlan 7", "1 trust on", "1 max_tx_rate 100",
        ]  # fmt: skip
        assert settings.read_all(PF) == {
            a("0000:01:10.0"): self.BEFORE,
            VF: VfSettings("52:54:00:00:00:01", 7, True, True, 100),
        }
        for _ in range(2):
            assert handler.undo(self.STEP) == 0
        assert settings.read(VF) == self.BEFORE

    def test_what_the_driver_has_not_is_named(self, vfs, context):
        handler = SetUpVfHandler(VfSettingsFiles(vfs.files, Ip(2, refuses=frozenset({"trust"}))))
        with pytest.raises(DeviceError, match=r"eth1 vf 1\): trust=on .* not supported") as caught:
            handler.apply(self.STEP, context)
        assert "leave trust out" in caught.value.advice
        assert handler.undo(self.STEP) == 0
        assert handler.undo(self.STEP) == 0

    def test_no_vf_or_no_interface(self, vfs, context):
        settings = VfSettingsFiles(vfs.files, Ip(2))
        with pytest.raises(DeviceError, match="is no VF"):
            settings.read(PF)
        (vfs.path(PF) / "net" / "eth1").rmdir()
        with pytest.raises(DeviceError, match="has no network interface"):
            settings.read(VF)
        assert settings.read_all(PF) == {}

    def test_vanished(self, vfs, context):
        handler = SetUpVfHandler(VfSettingsFiles(vfs.files, Ip(2)))
        vfs.remove(VF)
        assert handler.undo(self.STEP) == 0
        with pytest.raises(DeviceGoneError):
            handler.apply(self.STEP, context)

    @pytest.mark.parametrize("said", ["", "[]", "[{}]", '[{"vfinfo_list": [{}]}]', "nonsense"])
    def test_answers_that_make_no_sense(self, vfs, said):
        def ip(_arguments):
            return subprocess.CompletedProcess((), 0, said, "")

        with pytest.raises(DeviceError, match="VF"):
            VfSettingsFiles(vfs.files, ip).read(VF)


class Controller(NvmeAdmin):
    """An NVMe controller in memory with `total` flexible queues and interrupts."""

    def __init__(self, vfs: int, queues: int, interrupts: int, *, primary: bool = True) -> None:
        self.total = {Resource.QUEUES: queues, Resource.INTERRUPTS: interrupts}
        self.primary = dict(self.total) if primary else dict.fromkeys(Resource, 0)
        self.later = dict(self.primary)
        self.given = {n: dict.fromkeys(Resource, 0) for n in range(1, vfs + 1)}
        self.online: set[int] = set()

    def reset(self) -> None:
        self.primary = dict(self.later)

    def _identify(self, structure: int) -> bytes:
        page = bytearray(4096)
        if structure == 0x14:
            for resource, at in ((Resource.QUEUES, 32), (Resource.INTERRUPTS, 64)):
                used = sum(given[resource] for given in self.given.values())
                struct.pack_into(
                    "<IIHHH", page, at, self.total[resource], used, self.primary[resource], 2, 8
                )
            return bytes(page)
        page[0] = len(self.given)
        for index, (number, given) in enumerate(self.given.items()):
            values = (number, 0, number in self.online, number, given[0], given[1])
            struct.pack_into("<HHB3xHHH", page, 32 * (index + 1), *values)
        return bytes(page)

    def _manage(self, action, controller, resource, count):
        if action == 1:
            self.later[resource] = count
        elif action == 8:
            assert controller not in self.online
            used = sum(given[resource] for given in self.given.values())
            if used + count > self.total[resource] - self.primary[resource]:
                raise DeviceError("status 0x2021")
            self.given[controller][resource] = count
        elif action == 9:
            self.online.add(controller)


class TestNvme:
    """Queues for VFs; the reset of the primary is the price."""

    def build(self, machine, controller, *, vfs=2, uses=()):
        path = machine.add(PF, driver="nvme", sriov_numvfs="0", sriov_totalvfs="4")
        for number in range(vfs):
            machine.add(a(f"0000:01:00.{number + 1}"), pf=PF)
        directory = path / "nvme" / "nvme0"
        directory.mkdir(parents=True)
        (directory / "reset_controller").touch()
        (directory / "state").write_text("live\n")

        def reset(path, text):
            controller.reset()

        machine.files._reset_controller = reset
        return VfPools(machine.files, lambda _a: uses, admin=lambda _path: controller)

    def test_the_primary_gives_up_what_the_vfs_need(self, machine):
        controller = Controller(4, queues=8, interrupts=4)
        pools = self.build(machine, controller)
        pools.ensure_nvme(PF, 2)
        assert controller.online == {1, 2}
        assert controller.given[1] == {Resource.QUEUES: 2, Resource.INTERRUPTS: 1}
        assert machine.files.log == ["reset_controller=1"]
        pools.ensure_nvme(PF, 2)  # all are online: nothing to do
        assert machine.files.log == ["reset_controller=1"]

    def test_no_reset_where_enough_is_free(self, machine):
        controller = Controller(4, queues=8, interrupts=4, primary=False)
        self.build(machine, controller, uses=("nvme0n1 is on /",)).ensure_nvme(PF, 2)
        assert controller.online == {1, 2}
        assert machine.files.log == []

    def test_a_controller_that_the_host_uses_is_not_reset(self, machine):
        controller = Controller(4, queues=8, interrupts=4)
        with pytest.raises(DeviceError, match="nvme0n1 is on /"):
            self.build(machine, controller, uses=("nvme0n1 is on /",)).ensure_nvme(PF, 2)
        assert controller.online == set()
        assert machine.files.log == []

    def test_too_little_to_distribute(self, machine):
        controller = Controller(4, queues=8, interrupts=4)
        with pytest.raises(DeviceError, match="need 10 queues, 8 can be given"):
            self.build(machine, controller).ensure_nvme(PF, 5)
        assert machine.files.log == []

    def test_no_controller(self, machine):
        machine.add(PF)
        with pytest.raises(DeviceError, match="no NVMe controller"):
            VfPools(machine.files, lambda _a: ()).ensure_nvme(PF, 2)

    def test_what_is_read(self):
        controller = Controller(2, queues=8, interrupts=4)
        own, flexible = controller.read_flexible()
        assert own == 0
        assert flexible[Resource.QUEUES] == Flexible(8, 0, 8, 8)
        assert flexible[Resource.QUEUES].free == 0
        assert controller.read_secondaries() == (
            Secondary(1, False, 0, 0, 0), Secondary(2, False, 1, 0, 0),
        )  # fmt: skip

    def test_a_device_that_is_not_there(self, tmp_path):
        with pytest.raises(DeviceError, match="No such file"):
            NvmeAdmin(tmp_path / "nvme0").read_flexible()
