"""What QEMU must be able to lock for vfio, and the "no" where it may not."""

from __future__ import annotations

import pytest

from virtfabric.model.errors import Reason, Refusal
from virtfabric.model.units import GIB, MIB, Bytes
from virtfabric.policy.memlock import LockLimit, check_lock, lock_needed

NEEDED = Bytes(5 * GIB)


@pytest.mark.parametrize(
    ("functions", "viommu", "expected"),
    [
        (0, False, 0),
        (0, True, 0),
        (1, False, 5 * GIB),
        (3, False, 5 * GIB),
        (1, True, 5 * GIB),
        (3, True, 13 * GIB),
    ],
)
def test_all_memory_and_a_gibibyte_and_all_memory_each_behind_an_iommu(
    functions: int, expected: int, *, viommu: bool
) -> None:
    assert lock_needed(Bytes(4 * GIB), functions, viommu=viommu) == expected


@pytest.mark.parametrize(
    ("limit", "hard_limit"),
    [
        (LockLimit(None, raisable=False), None),
        (LockLimit(NEEDED, raisable=False), None),
        (LockLimit(Bytes(8 * MIB), raisable=True), None),
        (LockLimit(Bytes(8 * MIB), raisable=False, exempt=True), Bytes(GIB)),
        (LockLimit(Bytes(8 * MIB), raisable=True), NEEDED),
    ],
)
def test_enough_or_made_enough_by_libvirt(limit: LockLimit, hard_limit: Bytes | None) -> None:
    assert check_lock("db", NEEDED, limit, hard_limit=hard_limit) is None


@pytest.mark.parametrize("hard_limit", [None, Bytes(8 * GIB)])
def test_a_limit_that_nobody_may_raise_is_refused_with_the_remedy(hard_limit: Bytes | None) -> None:
    limit = LockLimit(Bytes(NEEDED - 1), raisable=False)
    answer = check_lock("db", NEEDED, limit, hard_limit=hard_limit)
    assert isinstance(answer, Refusal)
    assert answer.reason is Reason.MEMORY_LOCK_LIMIT
    assert "LimitMEMLOCK=5368709120" in answer.detail


def test_a_hard_limit_of_the_guest_is_named() -> None:
    limit = LockLimit(Bytes(8 * MIB), raisable=True)
    answer = check_lock("db", NEEDED, limit, hard_limit=Bytes(NEEDED - 1))
    assert isinstance(answer, Refusal)
    assert "virsh memtune db --hard-limit 5242880" in answer.detail
