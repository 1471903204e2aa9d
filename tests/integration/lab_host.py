"""`LabHost`: a private host with libvirtd, bus, hooks, agent and guests, for integration tests.

    with LabHost("name", tmp_path) as lab:
        lab.config(memory={"deadline_s": 5})
        lab.start_agent()
        lab.start_guests(BATCH, DATABASE)
        done = lab.cli("allocate", "database", "--memory", "+64M")

What it can do beyond this is in `demo.host.Host`: `cli`, `start_cli`, `cli_json`, `virsh`,
`start_agent`, `kill_agent`, `agent_log`, `observe`, `wait`. Every wait is for a condition, with a
deadline. Judge by `observe` and `demo.checker.expect_*`, never by what the agent says.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from demo import checker
from demo.host import AGENT, Guest, Host, HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from demo.checker import Finding, Observation

__all__ = ["BATCH", "DATABASE", "MIB", "WEB", "Guest", "HostError", "LabHost", "checker"]

MIB = checker.MIB
BATCH = Guest(
    name="batch", priority=10, cpu="200m:600m", max_vcpus=1, virtio_mem=384, plugged=384
)  # fmt: skip
WEB = Guest(name="web", priority=50, cpu="200m:300m", virtio_mem=128, plugged=64)
DATABASE = Guest(name="database", priority=90, cpu="500m:2", virtio_mem=512, plugged=64)
CAPACITY: dict[str, Any] = {
    "cpus": "0-1",
    "housekeeping": "0",
    "memory": "1088M",
    "reserve": "16M",
    "overhead": "16M",
}


HOSTS: list[LabHost] = []
"""Those that are up."""


class LabHost(Host):
    """A private host for one test or one module; `root` stays for a look (pytest removes it)."""

    def __init__(self, name: str, root: Path, *, agent_command: Sequence[str] = AGENT) -> None:
        """Describes it; `name` must be unique among those that run."""
        super().__init__(name, root, agent_command=agent_command, keep=True)

    def start(self) -> None:
        """Brings it up, with the default configuration written and no agent."""
        super().start()
        HOSTS.append(self)
        self.config()

    def stop(self) -> None:
        """Ends it and everything in it; safe to repeat."""
        if self in HOSTS:
            HOSTS.remove(self)
        super().stop()

    def config(self, **overrides: dict[str, object]) -> str:
        """Writes the configuration: two pCPUs and 1088 MiB, with tables overridden by name."""
        settings: dict[str, dict[str, object]] = {"capacity": dict(CAPACITY)}
        for table, values in overrides.items():
            settings[table] = settings.get(table, {}) | values
        return self.write_config(settings)

    def start_guests(self, *guests: Guest, ready: bool = True) -> None:
        """Defines and starts guests by virsh, and waits until they report about themselves.

        Raises:
            HostError: a start was refused.
        """
        for guest in guests:
            self.define(guest)
            done = self.start_guest(guest.name)
            if done.returncode:
                raise HostError(f"virsh start {guest.name}: {done.stderr.strip()}")
        if ready:
            self.wait_ready(*(guest.name for guest in guests))

    def start_again(self, name: str, *, timeout_s: float = 30) -> None:
        """Starts a guest that has just ended or was defined, as soon as it may.

        Raises:
            HostError: no start was taken in time; with what virsh said to the last.
        """
        refused = ""

        def started() -> bool:
            nonlocal refused
            done = self.start_guest(name)
            refused = done.stderr.strip()
            return done.returncode == 0

        try:
            self.wait(started, f"{name} starts", timeout_s=timeout_s)
        except HostError as error:
            raise HostError(f"virsh start {name}: {refused}\n{error}") from error

    def settle(self, *names: str, timeout_s: float = 30) -> None:
        """Waits until these guests (all when none is named) hold something and no plan runs.

        Raises:
            HostError: not in time, or one of them has ended.
        """

        def settled() -> bool:
            guests = {g["name"]: g for g in self.cli_json("guests")}
            wanted = names or tuple(self.guests)
            placed = {n for n in wanted if n in guests and guests[n]["cpu"]["grant"]}
            for name in set(wanted) - placed:
                self.must_run(name)
            return len(placed) == len(wanted) and not any(guests[n]["busy"] for n in placed)

        self.wait(settled, "the agent has placed the guests", timeout_s=timeout_s)

    def expect(
        self, judge: Callable[[dict[str, Observation]], Iterable[Finding]], timeout_s: float = 20
    ) -> dict[str, Observation]:
        """Asserts that `judge` finds everything right, within `timeout_s`; answers what was seen.

        Raises:
            AssertionError: with every bad finding and the end of the agent's log.
        """
        seen: dict[str, Observation] = {}

        def right() -> bool:
            seen.update(self.observe_all())
            return all(ok for ok, _ in judge(seen))

        if not checker.wait_until(right, timeout_s):
            bad = [text for ok, text in judge(seen) if not ok] if seen else ["nothing was seen"]
            raise AssertionError("\n".join([*bad, self.read_agent_log()]))
        return seen

    def expect_same(self, before: dict[str, Observation], timeout_s: float = 30) -> None:
        """Asserts that everything is, or becomes within `timeout_s`, as it was before."""
        checker.wait_for_news(map(self.console, before))
        self.expect(
            lambda seen: [checker.expect_same(seen[n], before[n]) for n in before], timeout_s
        )
