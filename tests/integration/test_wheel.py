"""The wheel carries hooks, templates and topologies, and works outside the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = """
from virtfabric.resources import hooks_dir, topologies_dir, xml_template_dir
from virtfabric.domxml.policy import format_policy, parse_policy
from virtfabric.model.policy import GuestPolicy
import virtfabric
assert "site" in virtfabric.__file__, virtfabric.__file__
assert (hooks_dir() / "qemu").is_file()
assert (xml_template_dir() / "policy.xml.j2").is_file()
assert (topologies_dir() / "small.json").is_file()
assert (topologies_dir() / "topology-1.schema.json").is_file()
assert parse_policy(format_policy(GuestPolicy())) == GuestPolicy()
print("works")
"""


def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    def run(*argv: object) -> str:
        done = subprocess.run(
            [str(a) for a in argv], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "-w", tmp_path / "dist", ROOT)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", site, wheel)
    # dependencies come from this environment, the package itself from the wheel only
    check = f"import sys; sys.path.insert(0, {str(site)!r})\n{CHECK}"
    assert run(sys.executable, "-c", check).strip() == "works"
    helped = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    helped += "from virtfabric.cli.main import main; main(['hooks', 'install', '--root', 'r'])"
    run(sys.executable, "-c", helped)
    assert (tmp_path / "r/etc/libvirt/hooks/qemu.d/50-virtfabric").stat().st_mode & 0o111
