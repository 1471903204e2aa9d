"""`virtfabric card provision` and `card sign`, as they are run."""

import json
import ssl

import pytest

from virtfabric.cli.main import main
from virtfabric.protocol.imagefile import parse_manifest
from virtfabric.trust.context import make_context
from virtfabric.trust.images import is_signed
from virtfabric.trust.store import identity_of_pem, read_credentials


@pytest.fixture
def run(tmp_path, capsys):
    def command(*args):
        words = ["card", *args]
        if args[0] == "provision":
            words += ["--authority", str(tmp_path / "authority")]
        code = main(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_the_first_certificate_makes_the_authority(run, tmp_path):
    code, out, err = run("provision", "--card", "C-1", "--out", str(tmp_path / "one"))
    assert code == 0
    assert "a new authority" in err
    assert "card C-1: credentials in" in out
    code, _, err = run("provision", "--host", "h-1", "--out", str(tmp_path / "two"))
    assert (code, err) == (0, "")
    one, two = read_credentials(tmp_path / "one"), read_credentials(tmp_path / "two")
    assert one.authority == two.authority
    assert identity_of_pem(two.certificate).uri == "urn:virtfabric:host:h-1"
    assert isinstance(make_context(one, server=True), ssl.SSLContext)
    issued = (tmp_path / "authority" / "issued").read_text().splitlines()
    assert [line.split()[1] for line in issued] == [
        "urn:virtfabric:card:C-1", "urn:virtfabric:host:h-1"
    ]  # fmt: skip
    for path in (tmp_path / "authority" / "key.pem", tmp_path / "one" / "key.pem"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "authority").stat().st_mode & 0o777 == 0o700


def test_nothing_is_overwritten_nor_issued_for_nothing(run, tmp_path):
    run("provision", "--card", "C-1", "--out", str(tmp_path / "one"))
    before = (tmp_path / "one" / "key.pem").read_bytes()
    code, _, err = run("provision", "--card", "C-2", "--out", str(tmp_path / "one"))
    assert code == 2
    assert "holds credentials already" in err
    assert (tmp_path / "one" / "key.pem").read_bytes() == before
    assert len((tmp_path / "authority" / "issued").read_text().splitlines()) == 1


def test_a_key_that_others_can_read_is_not_used(run, tmp_path):
    run("provision", "--card", "C-1", "--out", str(tmp_path / "one"))
    (tmp_path / "authority" / "key.pem").chmod(0o644)
    code, _, err = run("provision", "--card", "C-2", "--out", str(tmp_path / "two"))
    assert code == 2
    assert "can be read by others" in err
    assert "chmod 600" in err
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("serial", ["", "C 1", "../x", "x" * 65, "-C"])
def test_a_serial_number_that_no_certificate_can_name(run, tmp_path, serial):
    code, _, err = run(
        "provision", f"--card={serial or ' '}", "--out", str(tmp_path / "one")
    )  # fmt: skip
    assert code == 2
    assert "serial" in err


def test_an_image_is_signed_so_that_cards_take_it(run, tmp_path):
    run("provision", "--signer", "--out", str(tmp_path / "keys"))
    image = tmp_path / "aes.img"
    image.write_bytes(b"\x01" * 5000)
    key = str(tmp_path / "keys" / "signer.pem")
    code, out, _ = run(
        "sign", str(image), "--capability", "crypto.aes", "--key", key, "--name", "aes-1", "--json"
    )
    assert code == 0
    path = tmp_path / "aes.img.manifest"
    assert json.loads(out)["manifest"] == str(path)
    manifest, signature = parse_manifest(path.read_bytes())
    assert (manifest.name, manifest.size) == ("aes-1", 5000)
    assert is_signed(manifest, signature, [(tmp_path / "keys" / "signer.pub").read_bytes()])


def test_what_cannot_be_signed(run, tmp_path):
    run("provision", "--signer", "--out", str(tmp_path / "keys"))
    key = str(tmp_path / "keys" / "signer.pem")
    code, _, err = run("sign", str(tmp_path / "none"), "--capability", "crypto.aes", "--key", key)
    assert code == 1
    assert "No such file" in err
    empty = tmp_path / "empty"
    empty.touch()
    assert run("sign", str(empty), "--capability", "crypto.aes", "--key", key)[0] == 2
