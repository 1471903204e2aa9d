"""The configuration: what an administrator can get wrong, and what it means."""

from dataclasses import replace
from pathlib import Path

import pytest

from virtfabric.config import Config, load_config, resolve_capacity
from virtfabric.model.amounts import Tier
from virtfabric.model.errors import ConfigError
from virtfabric.model.host import HostTopology, NumaNode, Pcpu
from virtfabric.model.request import Offerable
from virtfabric.model.units import GIB, MIB, Bytes, CpuSet


def load(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.toml").write_text(text)
    return load_config(tmp_path)


def topology(*nodes, threads=2):
    """Nodes of (pCPUs, GiB); siblings are neighbours."""
    pcpus, made, first = {}, {}, 0
    for number, (count, size) in enumerate(nodes):
        cpus = CpuSet(range(first, first + count))
        for cpu in cpus:
            base = cpu - cpu % threads
            siblings = CpuSet(range(base, base + threads)) & cpus
            pcpus[cpu] = Pcpu(cpu, number, 0, base, CpuSet(siblings))
        made[number] = NumaNode(number, cpus, Bytes(size * GIB), Bytes(size * GIB))
        first += count
    return HostTopology("test", made, pcpus)


def test_nothing_configured(tmp_path):
    assert load_config(tmp_path) == Config()
    agent = Config().agent
    assert (agent.uri, str(agent.hook_socket)) == ("qemu:///system", "/run/virtfabric/hook.sock")


def test_everything_configured(tmp_path):
    config = load(
        tmp_path,
        a="""
        [agent]
        uri = "qemu:///session"
        run_dir = "/tmp/vf"
        bus = "unix:path=/tmp/bus"
        log_level = "debug"
        sample_interval_s = 2
        syslog = ""
        [capacity]
        cpus = "0-3,^1"
        housekeeping = "0"
        reserve = 0
        overhead = 1048576
        [capacity.memory]
        node0 = "4GiB"
        node1 = "2GiB"
        [memory]
        lend_ballooned = true
        deadline_s = 5
        [access]
        group = 108
        [[access.principal]]
        user = "alice"
        max_priority = 50
        max_cpu = 2.5
        max_memory = "8GiB"
        """,
    )
    assert config.agent.hook_socket == Path("/tmp/vf/hook.sock")
    assert config.agent.sample_interval_s == 2.0
    assert config.capacity.cpus == CpuSet([0, 2, 3])
    assert config.capacity.memory_by_node == {0: 4 * GIB, 1: 2 * GIB}
    assert (config.capacity.reserve, config.capacity.overhead) == (0, MIB)
    assert (config.memory.lend_ballooned, config.memory.deadline_s) == (True, 5.0)
    assert config.access.group == "108"
    [alice] = config.access.principals
    assert (alice.user, alice.max_cpu, alice.max_memory) == ("alice", 2500, 8 * GIB)


def test_later_files_win_key_by_key(tmp_path):
    config = load(
        tmp_path,
        a='[agent]\nlog_level="debug"\nuri="qemu:///a"\n[capacity]\nmemory="1GiB"\n'
        '[[access.principal]]\nuser="u"\nmax_priority=1\n[[access.principal]]\nuser="v"\n',
        b='[agent]\nuri="qemu:///b"\n[capacity.memory]\nnode0="2GiB"\n'
        '[[access.principal]]\nuser="u"\nmax_priority=2\n',
    )
    assert (config.agent.log_level, config.agent.uri) == ("debug", "qemu:///b")
    assert (config.capacity.memory, config.capacity.memory_by_node) == (None, {0: 2 * GIB})
    assert {p.user: p.max_priority for p in config.access.principals} == {"u": 2, "v": 100}


def test_options_win_over_files(tmp_path):
    (tmp_path / "x.toml").write_text('[agent]\nuri="qemu:///a"\n')
    overrides = {"agent.uri": "qemu:///c", "agent.state_dir": Path("/tmp/s")}
    config = load_config(tmp_path / "x.toml", overrides)
    assert (config.agent.uri, config.agent.state_dir) == ("qemu:///c", Path("/tmp/s"))
    with pytest.raises(ConfigError, match=r"option: agent\.log_level = 'loud' is not one of debug"):
        load_config(tmp_path, {"agent.log_level": "loud"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[agnet]", "agnet = {...} is not a known key; did you mean agent?"),
        ("agent = 3", "agent = 3 is not a table; write it as [agent]"),
        ('[agent]\nurl = "x"', "agent.url = 'x' is not a known key; did you mean uri?"),
        ("[agent]\nqqqq = 1", "agent.qqqq = 1 is not a known key; known: uri, state_dir"),
        ("[agent]\nuri = 3", "agent.uri = 3 is not text"),
        ('[agent]\nuri = ""', "agent.uri = '' is empty"),
        ('[agent]\nstate_dir = "here"', "agent.state_dir = 'here' is not an absolute path"),
        ('[agent]\nlog_level = "loud"', "agent.log_level = 'loud' is not one of debug, info"),
        ("[agent]\nsample_interval_s = 0", "agent.sample_interval_s = 0 is not between"),
        ("[agent]\nsample_interval_s = nan", "agent.sample_interval_s = nan is not between"),
        ("[agent]\ndrift_interval_s = true", "agent.drift_interval_s = True is not a number"),
        ("[capacity]\ncpus = 4", "capacity.cpus = 4 is not text"),
        ('[capacity]\ncpus = "4-2"', "capacity.cpus = '4-2' has an impossible range 4-2"),
        ('[capacity]\ncpus = "all"', "capacity.cpus = 'all' is not a CPU list (like 0-3,8)"),
        ('[capacity]\ncpus = "1,^1"', "capacity.cpus = '1,^1' names no CPU"),
        ('[capacity]\nmemory = "lots"', "capacity.memory = 'lots' is not a size (write it like"),
        ('[capacity]\nmemory = "0"', "capacity.memory = '0' must be above 0"),
        ("[capacity]\nmemory = -1", "capacity.memory = -1 is not a size"),
        ("[capacity]\nmemory = 1.5", "capacity.memory = 1.5 is not text"),
        ('[capacity.memory]\nn0 = "1G"', "capacity.memory.n0 = '1G' is not a known key; write"),
        ('[capacity.memory]\nnode0 = "1Q"', "capacity.memory.node0 = '1Q' is not a size"),
        ('[memory]\nlend_ballooned = "yes"', "memory.lend_ballooned = 'yes' is not true or false"),
        ("[memory]\ndeadline_s = -1", "memory.deadline_s = -1 is not between 0.1 and 3600"),
        ("[access]\ngroup = -1", "access.group = -1 is not text"),
        ("[access]\nprincipal = 1", "access.principal = 1 is not a list of tables"),
        ("[[access.principal]]", "access.principal[1] = {...} has no user"),
        ('[[access.principal]]\nuser = ""', "access.principal[1].user = '' is empty"),
        (
            '[[access.principal]]\nuser = "a"\n[[access.principal]]\nuser = "b"\nmax_cpus = 1',
            "access.principal[2].max_cpus = 1 is not a known key; did you mean max_cpu?",
        ),
        (
            '[[access.principal]]\nuser = "a"\nmax_priority = 101',
            "access.principal[1].max_priority = 101 is not a whole number from 0 to 100",
        ),
        (
            '[[access.principal]]\nuser = "a"\nmax_cpu = "0"',
            "access.principal[1].max_cpu = '0' must be above 0",
        ),
        ("[agent", "not TOML"),
    ],
)
def test_errors_name_file_key_and_value(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, wrong=text)
    assert str(caught.value).startswith(f"{tmp_path}/wrong.toml: {message}")


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "gone.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="byte 0 is not UTF-8"):
        load_config(tmp_path)


def test_ceilings(tmp_path):
    config = load(
        tmp_path,
        a='[[access.principal]]\nuser="alice"\nmax_priority=50\nmax_cpu="4"\n'
        '[[access.principal]]\nuser=1001\nmax_memory="1GiB"\n'
        '[[access.principal]]\nuser="*"\nmax_priority=10\n',
    )
    alice = config.ceiling_for(1000, "alice")
    assert alice.max_priority == 50
    assert dict(alice.max_amounts.to_json()) == {"cpu": 4000}
    assert config.ceiling_for(1001, "bob").max_amounts.memory == GIB
    assert config.ceiling_for(1002, "eve") == Offerable(10, None)
    assert config.ceiling_for(0, "root") == Offerable()


def test_capacity_by_default():
    capacity = resolve_capacity(Config(), topology((4, 8), (4, 24)))
    assert str(capacity.cpus) == "0-7"
    assert str(capacity.housekeeping) == "0-1"
    assert capacity.memory == {0: 8 * GIB, 1: 24 * GIB}
    assert capacity.reserve == 32 * GIB * 5 // 100
    assert capacity.overhead == 96 * MIB


def test_capacity_corner(tmp_path):
    config = load(tmp_path, a='[capacity]\ncpus="5-7"\nmemory="1001MiB"\n')
    capacity = resolve_capacity(config, topology((4, 8), (4, 24)))
    assert str(capacity.housekeeping) == "5"
    assert sum(capacity.memory.values()) == 1001 * MIB
    assert capacity.memory[1] > 2.9 * capacity.memory[0]
    assert capacity.reserve == 256 * MIB
    assert capacity.grantable_memory == 745 * MIB


def test_memory_by_node(tmp_path):
    config = load(tmp_path, a='[capacity.memory]\nnode1="2GiB"\n')
    assert resolve_capacity(config, topology((2, 4), (2, 4))).memory == {1: 2 * GIB}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('cpus = "2-9"', "capacity.cpus = '2-9' names pCPU 8-9, which the host does not have"),
        ('housekeeping = "64"', "capacity.housekeeping = '64' names pCPU 64"),
        ('memory = "33GiB"', "capacity.memory = 33GiB is more than the host's 32GiB"),
        ('memory = "256MiB"', "capacity.reserve = 256MiB leaves nothing"),
        ('memory = "1GiB"\nreserve = "2GiB"', "capacity.reserve = 2GiB leaves nothing of"),
        ('memory = {node7 = "1G"}', "capacity.reserve = 256MiB leaves nothing of"),
        ('memory = {node0 = "9G"}', "capacity.memory.node0 = 9GiB is more than the node's 8GiB"),
    ],
)
def test_impossible_capacity(tmp_path, text, message):
    config = load(tmp_path, a=f"[capacity]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        resolve_capacity(config, topology((4, 8), (4, 24)))
    assert str(caught.value).startswith(message)


def tiered():
    """Two nodes with pCPUs, and node 2 of 16 GiB that a CXL region became."""
    made = topology((4, 8), (4, 24))
    far = NumaNode(2, CpuSet(), Bytes(16 * GIB), Bytes(16 * GIB), tier=Tier.CXL)
    return replace(made, nodes=made.nodes | {2: far})


@pytest.mark.parametrize(
    ("text", "memory", "cxl"),
    [
        ("", {0: 8, 1: 24}, {2: 16}),
        ('[capacity]\nmemory = "8GiB"', {0: 2, 1: 6}, {}),
        ('[capacity.memory]\nnode1 = "4GiB"\nnode2 = "3GiB"', {1: 4}, {2: 3}),
    ],
)
def test_memory_of_a_cxl_node_counts_for_its_tier(tmp_path, text, memory, cxl):
    capacity = resolve_capacity(load(tmp_path, a=text), tiered())
    assert capacity.memory == {n: size * GIB for n, size in memory.items()}
    assert capacity.cxl == {n: size * GIB for n, size in cxl.items()}
    assert capacity.grantable_cxl == sum(cxl.values()) * GIB
    assert capacity.reserve == max(256 * MIB, sum(memory.values()) * GIB * 5 // 100)


def test_a_node_that_is_not_there_yet_counts_when_it_comes(tmp_path):
    text = '[capacity.memory]\nnode1 = "4GiB"\nnode2 = "3GiB"'
    config = load(tmp_path, a=text)
    before = resolve_capacity(config, topology((4, 8), (4, 24)))
    assert (before.memory, before.cxl) == ({1: 4 * GIB}, {})
    assert before.withheld == {2: "the host has no such node; it counts when it comes"}
    after = resolve_capacity(config, tiered())
    assert (after.memory, after.cxl, after.withheld) == ({1: 4 * GIB}, {2: 3 * GIB}, {})


def test_a_cxl_node_comes_block_by_block(tmp_path):
    config = load(tmp_path, a='[capacity.memory]\nnode0 = "4GiB"\nnode2 = "32GiB"')
    assert resolve_capacity(config, tiered()).cxl == {2: 16 * GIB}


def test_only_nodes_that_are_not_there(tmp_path):
    config = load(tmp_path, a='[capacity.memory]\nnode7 = "4GiB"')
    with pytest.raises(ConfigError) as caught:
        resolve_capacity(config, tiered())
    assert caught.value.advice == "the host has no node 7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"systemctl restart libvirtd"', "is not a list of words"),
        ('["systemctl"]', "is not an absolute path"),
        ('["/bin/systemctl", 3]', "is not text"),
    ],
)
def test_restart_command_that_is_none(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, a=f"[agent]\nrestart_libvirt = {text}\n")


def test_restart_command(tmp_path):
    assert Config().agent.restart_libvirt == ()
    text = '[agent]\nrestart_libvirt = ["/bin/systemctl", "restart", "libvirtd"]\n'
    found = load(tmp_path, a=text).agent.restart_libvirt
    assert found == ("/bin/systemctl", "restart", "libvirtd")


def test_reserve_is_of_dram(tmp_path):
    text = '[capacity]\nreserve="2GiB"\n[capacity.memory]\nnode0="1GiB"\nnode2="9GiB"'
    config = load(tmp_path, a=text)
    with pytest.raises(ConfigError, match=r"= 2GiB leaves nothing of capacity.memory = 1GiB"):
        resolve_capacity(config, tiered())


def test_memory_in_all_is_no_more_than_the_dram(tmp_path):
    config = load(tmp_path, a='[capacity]\nmemory="40GiB"')
    with pytest.raises(ConfigError, match="is more than the host's 32GiB"):
        resolve_capacity(config, tiered())
