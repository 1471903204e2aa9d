"""Huge pages of a simulated host: pools, what guests use of them, and the step that changes them.

Pages of a pool cannot be told apart, as in the kernel: what is free is what nobody uses. Tests
change a pool as an administrator does: `set_pool`, `use`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.adapters.simulated.handlers import SimulatedHandler
from virtfabric.model.errors import HypervisorError, Reason, Refusal, RefusedError, ShortfallError
from virtfabric.model.host import HugePages
from virtfabric.model.hugepages import HugePools, MakeHugePages, Pool, PoolKey
from virtfabric.model.units import Bytes

if TYPE_CHECKING:
    from virtfabric.adapters.simulated.guest import SimulatedGuest
    from virtfabric.adapters.simulated.host import SimulatedHost
    from virtfabric.model.ids import GuestId


class SimulatedPages:
    """Implements `ports.PageTree`; under the host's lock.

    Attributes:
        scattered: pools of which the kernel can make only so many pages more.
    """

    def __init__(self, host: SimulatedHost) -> None:
        self._host = host
        self._sizes: dict[PoolKey, int] = {}
        self._made: dict[PoolKey, dict[GuestId, int]] = {}
        self._others: dict[PoolKey, int] = {}
        self.scattered: dict[PoolKey, int] = {}

    # -- what the port asks ---------------------------------------------------------------------

    def read_pools(self) -> HugePools:
        """Every pool that was set up."""
        with self._host.lock:
            pools = {
                key: Pool(
                    HugePages(Bytes(key.page), size, self.free(key)), dict(self._made.get(key, {}))
                )
                for key, size in self._sizes.items()
            }
            nodes = self._host.read_topology().nodes
            return HugePools(pools, {n: node.memory_free for n, node in nodes.items()})

    # -- what happens beside the agent ----------------------------------------------------------

    def set_pool(self, key: PoolKey, size: int) -> None:
        """An administrator sets the size: from then on all of it is theirs."""
        with self._host.lock:
            self._sizes[key] = size
            self._made.pop(key, None)

    def use(self, key: PoolKey, count: int) -> None:
        """Somebody else than guests uses so many pages."""
        with self._host.lock:
            self._others[key] = count

    # -- under the host's lock ------------------------------------------------------------------

    def free(self, key: PoolKey) -> int:
        """Pages that nobody uses; below zero somebody was killed."""
        first = min(self._host.node_numbers)
        used = sum(g.pages_used(first).get(key, 0) for g in self._host.guests().values())
        return self._sizes.get(key, 0) - used - self._others.get(key, 0)

    def taken(self, node: int) -> int:
        """Bytes of a node that are in its pools."""
        return sum(size * key.page for key, size in self._sizes.items() if key.node == node)

    def check_start(self, guest: SimulatedGuest) -> None:
        """As QEMU, which touches all of a guest's memory before it starts.

        Raises:
            HypervisorError: it is not there.
        """
        for key, count in guest.pages_wanted(min(self._host.node_numbers)).items():
            if count > self.free(key):
                raise HypervisorError(
                    f"{guest.spec.name}: qemu: os_mem_prealloc: Insufficient free host memory "
                    "pages available to allocate guest RAM"
                )

    def made(self, key: PoolKey, guest: GuestId) -> int:
        """What is the agent's, for this guest."""
        return self._made.get(key, {}).get(guest, 0)

    def change(self, key: PoolKey, guest: GuestId, to: int) -> int:
        """Come as close as the kernel does; what was made for the guest then."""
        by = to - self.made(key, guest)
        if by > 0:
            room = int(self._host.read_topology().nodes[key.node].memory_free) // key.page
            by = min(by, room, self.scattered.get(key, by))
            if key in self.scattered:
                self.scattered[key] -= by
        else:
            by = max(by, -max(0, self.free(key)))
            if key in self.scattered:
                self.scattered[key] -= by
        self._sizes[key] += by
        whose = self._made.setdefault(key, {})
        whose[guest] = whose.get(guest, 0) + by
        if not whose[guest]:
            del whose[guest]
        return self.made(key, guest)


class _MakeHugePages(SimulatedHandler[MakeHugePages]):
    step_type = MakeHugePages
    event = None
    of_host = True

    def change(self, step: MakeHugePages, *, lost: bool) -> None:
        if lost:
            return
        pages = self.host.pages
        before = pages.made(step.pool, step.guest)
        reached = pages.change(step.pool, step.guest, step.after)
        if step.after < reached:
            raise ShortfallError(f"{step.describe()}: in use", reached=reached)
        if reached < step.after or pages.free(step.pool) < step.free:
            detail = (
                f"{step.name}: {reached - before} of {step.after - before} more {step.pool} could "
                f"be made, {pages.free(step.pool)} are free"
            )
            raise RefusedError(Refusal(Reason.NO_HUGE_PAGES, detail))

    def bring(self, guest: SimulatedGuest, step: MakeHugePages, *, lost: bool) -> None:
        self.change(step, lost=lost)

    def compare(self, step: MakeHugePages) -> str:
        found = self.host.pages.made(step.pool, step.guest)
        return "" if found == step.after else f"{found} found"

    def restore(self, step: MakeHugePages) -> int:
        self.host.pages.change(step.pool, step.guest, step.before)
        return 0


def page_handlers(host: SimulatedHost) -> tuple[_MakeHugePages, ...]:
    """One handler."""
    return (_MakeHugePages(host),)
