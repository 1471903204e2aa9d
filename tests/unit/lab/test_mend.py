"""The one write that goes, in code as the compiler made it; no other code is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from virtfabric.shim.lab.mend import mend, mend_file

if TYPE_CHECKING:
    from pathlib import Path

# helper_vmrun of QEMU 11.1.2, Debian forky: the vector of an interrupt, then that of an exception
INTERRUPT = bytes.fromhex(
    "410fb6f4" "4489ab80340000" "89b350c2ffff" "c7838434000000000000" "48c78388340000ffffffff"
)  # fmt: skip
EXCEPTION = bytes.fromhex(
    "4489ab80340000" "4489a350c2ffff" "c7838434000000000000" "48c78388340000ffffffff"
)  # fmt: skip
other = st.binary(max_size=200).filter(lambda code: mend(code + INTERRUPT) is not None)


@given(other, other)
def test_the_write_goes_and_all_else_stays(before: bytes, after: bytes) -> None:
    code = before + INTERRUPT + after + EXCEPTION
    mended = mend(code)
    assert mended is not None
    assert len(mended) == len(code)
    changed = [at for at, (old, new) in enumerate(zip(code, mended, strict=True)) if old != new]
    start = len(before) + 11
    assert changed == list(range(start, start + 6))
    assert mended[start : start + 6].hex() == "660f1f440000"
    assert mend(mended) is None


def test_what_is_not_known_is_left(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    for code in (b"", EXCEPTION, INTERRUPT * 2):
        program.write_bytes(code)
        assert not mend_file(program)
        assert program.read_bytes() == code
    program.write_bytes(INTERRUPT)
    assert mend_file(program)
    assert not mend_file(program)
