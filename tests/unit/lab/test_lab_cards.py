"""Offload cards of a lab: what is made for them, how they are found, that they end with it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest

from virtfabric.config import load_config
from virtfabric.shim.card.description import read_description
from virtfabric.shim.lab import cards as lab_cards
from virtfabric.shim.lab import lab
from virtfabric.shim.lab.image import LabImage
from virtfabric.shim.lab.machine import format_arguments
from virtfabric.shim.lab.place import LabError, Place
from virtfabric.shim.topology.shipped import read_shipped_topology
from virtfabric.trust.images import is_signed
from virtfabric.trust.store import identity_of_pem, read_credentials

TOPOLOGY = read_shipped_topology("card")


@pytest.fixture
def place(tmp_path):
    directory = tmp_path / "labs" / "one"
    directory.mkdir(parents=True)
    return Place(directory)


@pytest.fixture
def cards(place):
    cards = lab_cards.cards_of(TOPOLOGY, place)
    lab_cards.provision_cards(cards)
    return cards


def test_each_card_is_near_the_node_of_its_ports(cards):
    assert [(card.serial, card.node) for card in cards] == [("card0", 0), ("card1", 1)]
    described = [read_description(card.description) for card in cards]
    assert [one.adapter.serial for one in described] == ["card0", "card1"]
    assert [one.adapter.site for one in described] == ["node:0", "node:1"]
    for card, one in zip(cards, described, strict=True):
        mine = read_credentials(one.credentials)
        assert identity_of_pem(mine.certificate).uri == f"urn:virtfabric:card:{card.serial}"


def test_the_host_gets_its_credentials_and_images_that_cards_take(cards, place):
    files = lab_cards.host_files(place)
    assert identity_of_pem(read_credentials(files).certificate).uri == "urn:virtfabric:host:lab"
    from virtfabric.daemon.carddesk import read_image

    (signer,) = read_description(cards[0].description).signers
    for capability in lab_cards.IMAGES:
        image = read_image(files / f"{capability}.img")
        assert image.manifest.capability == capability
        assert is_signed(image.manifest, image.signature, [signer.read_bytes()])
    assert not list(files.glob("*signer*")), "the signing key does not go into the lab"


def test_the_agents_configuration_names_the_mailboxes(tmp_path):
    text = lab_cards.format_config({"card0": "0000:01:00.0", "card1": "0000:51:00.0"})
    (tmp_path / "cards.toml").write_text(text)
    found = load_config(tmp_path).cards
    assert [(c.serial, str(c.mailbox)) for c in found.cards] == [
        ("card0", "0000:01:00.0"), ("card1", "0000:51:00.0"),
    ]  # fmt: skip


def test_a_mailbox_is_looked_for_behind_its_port():
    here, there = (lab_cards.format_search(TOPOLOGY, p) for p in ("card0-mgmt", "card1-mgmt"))
    assert "/sys/bus/pci/devices/0000:00:10.0/0000:??:??.?/resource2" in here
    assert "/sys/bus/pci/devices/0000:50:00.0/0000:??:??.?/resource2" in there


def test_the_labs_qemu_has_a_monitor_for_each_card(place, tmp_path):
    image = LabImage(tmp_path / "vmlinux", tmp_path / "initrd", tmp_path / "root")
    words = format_arguments(TOPOLOGY, image, place, accel="tcg", port=1, epoch=2)
    for card in ("card0", "card1"):
        assert f"unix:{place.card_monitor(card)},server=on,wait=off" in words


def stand_in(card):
    """A process that is found as the card's."""
    argv = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    process = subprocess.Popen(
        [*argv, "virtfabric.cli.cardd", str(card.description)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    return process


def test_what_a_killed_up_left_ends_with_the_lab(cards, place, monkeypatch):
    monkeypatch.setenv("VIRTFABRIC_LABS", str(place.directory.parent))
    left = [stand_in(card) for card in cards]
    with pytest.raises(LabError, match="card0 runs already"):
        cards[0].start()
    assert lab.down(place.name)
    assert [process.wait(10) for process in left] == [-9, -9]
    assert not place.directory.exists()


def test_who_only_reads_a_cards_description_is_no_card(cards, place):
    reader = subprocess.Popen(["tail", "-f", cards[0].description], stdout=subprocess.DEVNULL)
    try:
        assert cards[0].find_processes() == []
        assert not cards[0].kill()
        lab_cards.end_cards(place)
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.wait()


def test_a_card_that_does_not_start_says_why(cards):
    cards[0].description.write_text("version = 2\n")
    with pytest.raises(LabError, match="card card0 did not start") as error:
        cards[0].start()
    assert "version: 2 is not" in "\n".join(error.value.log)


def test_a_cards_power_is_not_switched_while_its_lab_ends(cards, place, monkeypatch):
    monkeypatch.setenv("VIRTFABRIC_LABS", str(place.directory.parent))
    switched = []

    def read_scene(_):
        switched.append(True)
        raise LabError("there is no lab one")

    monkeypatch.setattr(lab, "read_scene", read_scene)
    with ThreadPoolExecutor() as pool:
        with place.locked():
            switching = pool.submit(lab.switch_card, place.name, "card0", lab.Power.ON)
            assert wait([switching], timeout=1).not_done
            assert not switched
            place.remove()
        with pytest.raises(LabError, match="there is no lab"):
            switching.result(timeout=30)


def test_cards_may_be_called_like_what_belongs_to_all(place):
    named = [
        replace(card, id=name)
        for card, name in zip(TOPOLOGY.cards, ("host", "authority"), strict=True)
    ]
    cards = lab_cards.cards_of(replace(TOPOLOGY, cards=tuple(named)), place)
    lab_cards.provision_cards(cards)
    for card in cards:
        mine = read_credentials(read_description(card.description).credentials)
        assert identity_of_pem(mine.certificate).uri == f"urn:virtfabric:card:{card.serial}"
