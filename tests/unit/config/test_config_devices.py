"""`[[device]]`: what each key means, and what an administrator is told about a wrong one."""

import pytest

from virtfabric.config import Config, load_config
from virtfabric.model.device import DevicePool, Match, PciAddress, VfSettings
from virtfabric.model.errors import ConfigError
from virtfabric.model.profile import Profile, ProfileFile

PF = PciAddress("0000:3b:00.0")


def load(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    return load_config(tmp_path)


def test_no_devices():
    assert Config().pools == ()


def test_everything(tmp_path):
    config = load(
        tmp_path,
        a="""
        [[device]]
        capability = "net.vf"
        match = { pf = "3b:00.0", vfs = true, class = "0200", ids = "8086:10CA", driver = "igbvf" }
        vf = { vlan = 7, trust = true, spoofchk = false, rate = 1000 }
        vf_count = 4
        one_time_use = true
        link_speed = "2.5GT/s"
        [[device]]
        capability = "storage.nvme"
        match.address = ["0000:01:00.1", "01:00.2"]
        nvme_queues = 2
        [[device]]
        capability = "gpu.vf"
        match.ids = "10de:20b0"
        vfio_driver = "nvidia"
        profile = { file = "nvidia/current_vgpu_type", value = "1155", none = "0" }
        """,
        b="""
        [[device]]
        capability = "net.vf"
        match.address = "0000:3c:10.0"
        vf.mac = "52:54:00:AA:00:01"
        """,
    )
    net, nvme, gpu, one = config.pools
    assert net == DevicePool(
        "net.vf",
        Match(ids=frozenset({"8086:10ca"}), class_prefix="0200", pf=PF, vfs=True, driver="igbvf"),
        VfSettings(vlan=7, trust=True, spoofchk=False, rate=1000),
        vf_count=4,
        one_time_use=True,
        link_speed=2500,
    )
    assert nvme.match.addresses == {PciAddress("0000:01:00.1"), PciAddress("0000:01:00.2")}
    assert (nvme.nvme_queues, nvme.one_time_use, nvme.settings) == (2, False, VfSettings())
    assert one.settings == VfSettings(mac="52:54:00:aa:00:01")
    profile = Profile(ProfileFile("nvidia/current_vgpu_type"), "1155", "0")
    assert (gpu.vfio_driver, gpu.profile) == ("nvidia", profile)
    assert (one.vfio_driver, one.profile) == ("vfio-pci", None)


NET = 'capability = "net.vf"\n'
ONE = NET + 'match.pf = "3b:00.0"\n'
PROFILE = ONE + 'profile.file = "vendor/type"\nprofile.value = "7"\n'
TEXT = ONE + 'profile.file = "vendor/type"\nprofile.none = "0"\n'
FILE = ONE + 'profile = {{ value = "7", none = "0", file = "{}" }}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("match.vfs = true", "device[1] = {...} has no capability"),
        (NET, "device[1] = {...} has no match"),
        (NET + "match = 3", "device[1].match = 3 is not a table"),
        (NET + "match = {}", "device[1].match = {...} has no condition"),
        ('capability = "Net"', "device[1].capability = 'Net' is not dotted like net.vf"),
        (ONE + "vfcount = 2", "device[1].vfcount = 2 is not a known key; did you mean vf_count?"),
        (NET + 'match.pff = "3b:00.0"', "device[1].match.pff = '3b:00.0' is not a known key"),
        (NET + 'match.pf = "3b:00"', "device[1].match.pf = '3b:00' is not a PCI address"),
        (NET + "match.address = []", "device[1].match.address = [] is empty"),
        (
            NET + 'match.address = ["3b:00.0", "0000:3b:00.0"]',
            "device[1].match.address = ['3b:00.0', '0000:3b:00.0'] names 0000:3b:00.0 twice",
        ),
        (NET + 'match.ids = "8086"', "device[1].match.ids = '8086' is not vendor:device"),
        (NET + 'match.class = "020"', "device[1].match.class = '020' is not 2, 4 or 6"),
        (NET + 'match.driver = "../x"', "device[1].match.driver = '../x' is not the name"),
        (NET + "match.vfs = 1", "device[1].match.vfs = 1 is not true or false"),
        (ONE + "vf = 1", "device[1].vf = 1 is not a table"),
        (ONE + "vf.vlan = 4095", "device[1].vf.vlan = 4095 is out of range"),
        (ONE + "vf.vlan = true", "device[1].vf.vlan = True is not a whole number"),
        (ONE + 'vf.trust = "on"', "device[1].vf.trust = 'on' is not true or false"),
        (ONE + "vf.rate = -1", "device[1].vf.rate = -1 is out of range"),
        (
            NET + 'match.address = "3b:10.0"\nvf.mac = "01:00:5e:00:00:01"',
            "device[1].vf.mac = '01:00:5e:00:00:01' is out of range",
        ),
        (
            ONE + 'vf.mac = "52:54:00:00:00:01,vlan=7"',
            "device[1].vf.mac = '52:54:00:00:00:01,vlan=7' is out of range",
        ),
        (
            ONE + 'vf.mac = "52:54:00:00:00:01"',
            "device[1].vf.mac = '52:54:00:00:00:01' would be the MAC of every function",
        ),
        (ONE + "vf_count = 0", "device[1].vf_count = 0 is not a whole number from 1 to 65535"),
        (NET + "match.vfs = true\nvf_count = 2", "device[1].vf_count = 2 needs match.pf"),
        (
            ONE + "match.vfs = false",
            "device[1].match.vfs = False but match.pf means its VFs",
        ),
        (
            NET + "match.vfs = false\nvf.vlan = 3",
            "device[1].vf = 'vlan=3' but match.vfs = false leaves no VF",
        ),
        (NET + "match.vfs = false\nnvme_queues = 1", "device[1].nvme_queues = 1 is for VFs only"),
        (ONE + 'one_time_use = "yes"', "device[1].one_time_use = 'yes' is not true or false"),
        (ONE + 'link_speed = "7GT/s"', "device[1].link_speed = '7GT/s' is not one of 2.5GT/s"),
        (ONE + "link_speed = 8", "device[1].link_speed = 8 is not text"),
        (
            ONE + 'vfio_driver = "../x"',
            "device[1].vfio_driver = '../x' is not the name of a driver",
        ),
        (ONE + 'profile = "7"', "device[1].profile = '7' is not a table"),
        (PROFILE, "device[1].profile = {...} has no none"),
        (TEXT, "device[1].profile = {...} has no value"),
        (ONE + "profile = {}", "device[1].profile = {...} has no file"),
        (PROFILE + 'profile.non = "0"', "device[1].profile.non = '0' is not a known key"),
        (PROFILE + "profile.none = 0", "device[1].profile.none = 0 is not text"),
        (PROFILE + 'profile.none = "7"', "device[1].profile.value = '7' is what the file has when"),
        (TEXT + 'profile.value = ""', "device[1].profile.value = '' is empty"),
        (TEXT + 'profile.value = "7\\n"', "device[1].profile.value = '7\\n' is not printable"),
        (TEXT + 'profile.value = " 7"', "device[1].profile.value = ' 7' is not printable"),
        (
            TEXT + f'profile.value = "{"7" * 65}"',
            f"device[1].profile.value = '{'7' * 65}' is longer",
        ),
        *(
            (FILE.format(file), f"device[1].profile.file = {file!r} {problem}")
            for file, problem in (
                ("current_vgpu_type", "is not DIRECTORY/NAME below the function (write it like"),
                ("/nvidia/type", "is not DIRECTORY/NAME"),
                ("../0000:3b:00.1/type", "is not DIRECTORY/NAME"),
                ("nvidia/../config", "is not DIRECTORY/NAME"),
                ("nvidia/a/b", "is not DIRECTORY/NAME"),
                ("nvidia/a.b", "is not DIRECTORY/NAME"),
                ("driver/unbind", "leads out of the function's own directory: driver is a link"),
                ("subsystem/rescan", "leads out of"),
                ("iommu_group/type", "leads out of"),
                ("physfn/sriov_numvfs", "leads out of"),
                ("virtfn12/reset", "leads out of"),
            )
        ),
        (
            f"{ONE}[[device]]\n{ONE.replace('net.vf', 'net.other')}",
            "device[2].match = 'pf 0000:3b:00.0' is the same as that of another [[device",
        ),
        (
            f'{NET}match.address = ["1:0.0", "1:0.1"]\n[[device]]\n{NET}match.address = "1:0.1"',
            "device[2].match.address = '0000:01:00.1' is in another [[device]] too (net.vf)",
        ),
        (
            f"{ONE}vf_count = 2\n[[device]]\n{ONE}match.vfs = true\nvf_count = 4",
            "device[2].vf_count = 4 but another [[device]] gives 0000:3b:00.0 2 VFs",
        ),
    ],
)
def test_errors_name_file_key_and_value(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, wrong=f"[[device]]\n{text}")
    assert str(caught.value).startswith(f"{tmp_path}/wrong.toml: {message}")


def test_one_table_is_no_list(tmp_path):
    with pytest.raises(ConfigError, match=r"device = {...} is not a list of tables; write \[\["):
        load(tmp_path, wrong="[device]\n" + ONE)


def test_doubles_over_files(tmp_path):
    with pytest.raises(ConfigError, match=r"b\.toml: device\[1\]\.match = .* another \[\[device"):
        load(tmp_path, a=f"[[device]]\n{ONE}", b=f"[[device]]\n{ONE}")
