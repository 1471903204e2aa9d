"""Certificates and signatures: judged by the openssl command, and by changing what was signed."""

import dataclasses
import subprocess

import pytest
from trust_data import CARD, NOW, authority, credentials

from virtfabric.model.errors import InvalidValueError
from virtfabric.protocol.messages import Role
from virtfabric.trust.authority import Credentials, issue
from virtfabric.trust.identity import Identity
from virtfabric.trust.images import describe_image, is_signed, make_signer, sign_image


def test_openssl_takes_the_chain_and_reads_the_serial(tmp_path):
    mine = credentials(CARD)
    (tmp_path / "ca.pem").write_bytes(mine.authority)
    (tmp_path / "card.pem").write_bytes(mine.certificate)

    def openssl(*argv):
        done = subprocess.run(
            ["openssl", *argv], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for purpose in ("sslserver", "sslclient"):
        said = openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem",
                       "card.pem")  # fmt: skip
        assert said == "card.pem: OK\n"
    text = openssl("x509", "-in", "card.pem", "-noout", "-text")
    assert "URI:urn:virtfabric:card:C-1" in text
    assert "serialNumber = C-1" in text
    assert "CA:FALSE" in text


@pytest.mark.parametrize("serial", ["", "a b", "a\nb", "é", "-a", "a" * 65])
def test_a_serial_number_is_plain(serial):
    with pytest.raises(InvalidValueError, match="serial"):
        Identity.of(Role.CARD, serial)


def test_what_is_no_authority_issues_nothing():
    with pytest.raises(InvalidValueError, match="authority"):
        issue(Credentials(authority().certificate, b"no key", b""), CARD, NOW)


def test_a_signature_holds_for_one_manifest_and_one_signer():
    key, public = make_signer()
    _, other = make_signer()
    image = describe_image("aes-1", "crypto.aes", b"bits", 2_000_000_000)
    signature = sign_image(key, image)
    assert is_signed(image, signature, [other, public])
    assert not is_signed(image, signature, [other])
    assert not is_signed(image, signature, [])
    assert not is_signed(image, "00" * 64, [public])
    changes = {
        "name": "aes-2", "capability": "crypto.des", "size": 5, "digest": "0" * 64, "not_after": 1
    }  # fmt: skip
    assert changes.keys() == {field.name for field in dataclasses.fields(image)}
    for name, value in changes.items():
        changed = dataclasses.replace(image, **{name: value})
        assert not is_signed(changed, signature, [public]), name


def test_only_ed25519_keys_sign():
    image = describe_image("aes-1", "crypto.aes", b"bits", 2_000_000_000)
    for key in (b"no", credentials(CARD).key):
        with pytest.raises(InvalidValueError, match="signing key"):
            sign_image(key, image)
    with pytest.raises(InvalidValueError, match="signer"):
        is_signed(image, "00" * 64, [b"no"])
