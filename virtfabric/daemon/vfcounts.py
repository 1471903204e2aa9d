"""VFs of the pools: made when the agent starts and a PF has none; those that are there stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtfabric.model.errors import DeviceError

if TYPE_CHECKING:
    from virtfabric.daemon.notices import Notices
    from virtfabric.model.device import DevicePool, PciAddress
    from virtfabric.ports import AuditLog, VfMaker


def make_vfs(
    maker: VfMaker, pools: tuple[DevicePool, ...], notices: Notices, audit: AuditLog
) -> None:
    """See that each PF of a pool has VFs; what cannot be is an alert, and the agent goes on."""
    for pool in pools:
        pf = pool.match.pf
        if pf is None:
            continue
        topic = f"vfs {pf}"
        try:
            problem = _make(maker, pool, pf, audit)
        except DeviceError as error:
            problem = str(error)
        if problem:
            notices.alert(topic, f"{pool.capability}: {problem}")
        else:
            notices.settle(topic)


def _make(maker: VfMaker, pool: DevicePool, pf: PciAddress, audit: AuditLog) -> str:
    problem = ""
    if pool.vf_count is not None:
        found = maker.ensure(pf, pool.vf_count)
        body = {"pf": pf, "asked": pool.vf_count, "found": found}
        audit.append("device.vfs", [pf], body)
        if found != pool.vf_count:
            problem = (
                f"PF {pf} has {found} VFs and [[device]] asks for {pool.vf_count}: a count that is "
                f"there is not changed, as that destroys every VF; when none is in use, write 0 to "
                f"/sys/bus/pci/devices/{pf}/sriov_numvfs and reload the agent"
            )
    if pool.nvme_queues is not None:
        maker.ensure_nvme(pf, pool.nvme_queues)
    return problem
