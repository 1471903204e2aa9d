"""The simulated host behind the reading ports: guests, events, policy, statistics."""

import threading

import pytest

from virtfabric.adapters.simulated.guest import GuestSpec
from virtfabric.adapters.simulated.machines import BATCH, CACHE, DATABASE, WEB, small_host
from virtfabric.model.errors import GuestGoneError, HypervisorError, HypervisorGoneError
from virtfabric.model.guest import RunState
from virtfabric.model.ids import GuestId
from virtfabric.model.plan import PinVcpu
from virtfabric.model.policy import GuestPolicy
from virtfabric.model.units import GIB, MIB, CpuSet
from virtfabric.ports import EventKind

OTHER = GuestId("00000000-0000-4000-8000-000000000002")


@pytest.fixture
def host():
    host = small_host()
    yield host
    host.events.close()


@pytest.fixture
def heard(host):
    events = []
    host.events.start(events.append)

    def listen():
        host.events.drain()
        found = [(e.kind, e.guest) for e in events]
        events.clear()
        return found

    assert listen() == [(EventKind.CONNECTED, None)]
    return listen


def test_topology_counts_what_guests_use(host):
    topology = host.read_topology()
    assert len(topology.pcpus) == 8
    assert topology.has_smt
    assert topology.nodes[0].memory_free == 8 * GIB - 3 * GIB - 512 * MIB
    host.stop_guest(BATCH)
    assert host.read_topology().nodes[0].memory_free == 6 * GIB - 512 * MIB


def test_guests_are_read_as_they_are(host):
    guests = host.read_guests()
    assert {g.name for g in guests.values()} == {"batch", "web", "cache", "database"}
    database = host.read_guest(DATABASE)
    assert database == guests[DATABASE]
    assert database.memory_current == GIB
    assert database.memory_max == 4 * GIB + 512 * MIB
    assert set(database.vcpu_threads) == set(database.vcpu_affinity) == {0, 1}
    assert len({g.pid for g in guests.values()}) == 4
    assert host.read_guest(OTHER) is None


def test_start_and_stop_tell(host, heard):
    host.start_guest(GuestSpec(OTHER, "other", persistent=False))
    assert heard() == [(EventKind.DEFINED, OTHER), (EventKind.STARTED, OTHER)]
    with pytest.raises(HypervisorError):
        host.start_guest(OTHER)
    host.stop_guest(OTHER)
    assert heard() == [(EventKind.STOPPED, OTHER)]
    assert host.read_guest(OTHER) is None
    host.stop_guest(WEB)
    host.stop_guest(WEB)
    assert heard() == [(EventKind.STOPPED, WEB)]
    assert host.read_guest(WEB).state is RunState.SHUTOFF
    assert host.kernel(WEB) is None


def test_restart_forgets_live_changes(host):
    pin = PinVcpu(guest=WEB, vcpu=0, before=CpuSet(), after=CpuSet([3]))
    host.change_beside(pin)
    assert host.read_guest(WEB).vcpu_affinity[0] == {3}
    first_pid = host.read_guest(WEB).pid
    host.stop_guest(WEB)
    host.start_guest(WEB)
    assert host.read_guest(WEB).vcpu_affinity[0] == host.cpus
    assert host.read_guest(WEB).pid != first_pid


def test_life_beside_the_agent(host, heard):
    host.suspend_guest(WEB)
    assert host.read_guest(WEB).state is RunState.PAUSED
    host.resume_guest(WEB)
    host.rename_guest(WEB, "www")
    host.set_job(WEB, "backup")
    host.change_beside(PinVcpu(guest=WEB, vcpu=0, before=CpuSet(), after=CpuSet([3])))
    assert heard() == [
        (EventKind.SUSPENDED, WEB), (EventKind.RESUMED, WEB), (EventKind.DEFINED, WEB),
        (EventKind.JOB, WEB), (EventKind.TUNABLE, WEB),
    ]  # fmt: skip
    assert (host.read_guest(WEB).name, host.read_guest(WEB).job) == ("www", "backup")


def test_policy_is_written(host, heard):
    host.write_policy(WEB, None)
    assert not host.read_guest(WEB).managed
    host.write_policy(WEB, GuestPolicy(priority=7))
    assert host.read_guest(WEB).policy.priority == 7
    assert heard() == [(EventKind.METADATA, WEB)] * 2
    with pytest.raises(GuestGoneError):
        host.write_policy(OTHER, None)


def test_connection_goes_and_comes(host, heard):
    host.disconnect()
    for call in (host.read_guests, host.read_topology, lambda: host.read_guest(WEB)):
        with pytest.raises(HypervisorGoneError):
            call()
    assert host.kernel(WEB) is not None
    host.reconnect()
    assert heard() == [(EventKind.DISCONNECTED, None), (EventKind.CONNECTED, None)]
    assert host.read_guest(WEB) is not None


def test_events_come_from_another_thread_and_stop(host):
    threads = []
    host.events.start(lambda _e: threads.append(threading.current_thread()))
    host.events.close()
    host.events.close()
    assert threads
    assert threads[0] is not threading.current_thread()
    host.stop_guest(WEB)
    assert len(threads) == 1


def test_statistics(host):
    host.stop_guest(BATCH)
    stats = host.stats.sample()
    assert set(stats) == {WEB, CACHE, DATABASE}
    assert stats[WEB]["balloon.current"] == GIB
    assert {"cpu_percent", "memory_available", "agent_rss", "agent_cpu_percent"} <= set(
        host.load.sample()
    )
