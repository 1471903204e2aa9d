"""The registers of a card's functions, by name. docs/card-protocol.md has the same tables."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from virtfabric.shim.cardpci.descriptors import MAX_LENGTH
from virtfabric.shim.cardpci.registers import Access, Register, RegisterMap
from virtfabric.shim.vfiouser.config import Identity

VENDOR: Final = 0xF0CA
"""Not assigned to anybody as far as we know; nobody sells such cards."""
MANAGEMENT_DEVICE, SLICE_DEVICE = 0x0C01, 0x0C02
BADGE: Final = 1
"""Which designated capability of this vendor says which slice a function is."""
BADGE_TEXT: Final = 64
VERSION: Final = 1 << 16
BAR_SIZE: Final = 4096
WINDOW_RING: Final = 64 << 10
"""Bytes of each of the two rings in the mailbox's window."""
QUEUES: Final = 2
QUEUE_BLOCK: Final = 0x40

_RO, _WO, _RW, _W1C = Access.READ, Access.WRITE, Access.BOTH, Access.CLEAR
_MANAGEMENT_MAGIC: Final = int.from_bytes(b"VFCM", "little")
_SLICE_MAGIC: Final = int.from_bytes(b"VFCS", "little")
_CLASSES: Final = {"crypto": 0x108000, "net": 0x028000}
"""Base classes 10h and 02h, "other"; everything else is a processing accelerator."""
_ACCELERATOR: Final = 0x120000


class MailboxStatus(IntFlag):
    """Bits of the management function's STATUS."""

    READY = 1
    OPEN = 2
    ENDED = 4
    BROKEN = 8


class MailboxCause(IntFlag):
    """Bits of its IRQ_STATUS."""

    RECEIVED = 1
    ROOM = 2
    CHANGED = 4


class SliceCause(IntFlag):
    """Bits of a slice's IRQ_STATUS."""

    QUEUE0 = 1
    QUEUE1 = 2
    CHANGED = 4
    FAULT = 8


MANAGEMENT: Final = RegisterMap((
    Register(0x000, "MAGIC", _RO, "the letters VFCM", _MANAGEMENT_MAGIC),
    Register(0x004, "VERSION", _RO, "of this map: major, minor (16 bits each)", VERSION),
    Register(0x008, "BOOT", _RO, "differs after each start of the firmware", None),
    Register(0x00C, "STATUS", _RO, "1 ready, 2 session open, 4 it ended, 8 broken index", None),
    Register(0x010, "CONTROL", _WO, "1 opens a session (rings empty), 2 closes it"),
    Register(0x014, "SESSION", _RO, "how many sessions were opened", None),
    Register(0x018, "IRQ_STATUS", _W1C, "1 bytes came, 2 bytes were taken, 4 STATUS changed"),
    Register(0x01C, "IRQ_MASK", _RW, "causes that send the message"),
    Register(0x020, "TX_OFFSET", _RO, "of the ring to the card, in BAR 2", 0),
    Register(0x024, "TX_SIZE", _RO, "its bytes, a power of two", WINDOW_RING),
    Register(0x028, "TX_HEAD", _RW, "bytes put in by the host, modulo 2^32; rings the doorbell"),
    Register(0x02C, "TX_TAIL", _RO, "bytes taken out by the card"),
    Register(0x030, "RX_OFFSET", _RO, "of the ring from the card, in BAR 2", WINDOW_RING),
    Register(0x034, "RX_SIZE", _RO, "its bytes, a power of two", WINDOW_RING),
    Register(0x038, "RX_HEAD", _RO, "bytes put in by the card"),
    Register(0x03C, "RX_TAIL", _RW, "bytes taken out by the host; rings the doorbell"),
    Register(0x040, "SERIAL", _RO, "of the card, text", None, 16),
))  # fmt: skip


def _queue(number: int) -> tuple[Register, ...]:
    at, name = 0x200 + QUEUE_BLOCK * number, f"Q{number}_"
    return (
        Register(at, name + "RING", _RW, "descriptors: address, multiple of 64", 0, 2),
        Register(at + 0x08, name + "DONE_RING", _RW, "completions: address, multiple of 16", 0, 2),
        Register(at + 0x10, name + "ENTRIES", _RW, "of each ring: a power of two, 2 to 1024"),
        Register(at + 0x14, name + "CONTROL", _RW, "1 runs the queue, 0 stops it"),
        Register(at + 0x18, name + "STATUS", _RO, "0 stopped, 1 runs, 2 stopped by a fault"),
        Register(at + 0x1C, name + "SUBMITTED", _RW, "descriptors given, modulo 2^32; doorbell"),
        Register(at + 0x20, name + "COMPLETED", _RO, "descriptors done, modulo 2^32"),
    )  # fmt: skip


SLICE: Final = RegisterMap((
    Register(0x000, "MAGIC", _RO, "the letters VFCS", _SLICE_MAGIC),
    Register(0x004, "VERSION", _RO, "of this map", VERSION),
    Register(0x008, "BOOT", _RO, "differs after each start of the firmware", None),
    Register(0x00C, "STATE", _RO, "0 blank, 1 loading, 2 programming, 3 ready, 4 gone", None),
    Register(0x010, "IRQ_STATUS", _W1C, "1 queue 0, 2 queue 1, 4 STATE changed, 8 fault"),
    Register(0x014, "IRQ_MASK", _RW, "causes that send the message"),
    Register(0x018, "MAX_LENGTH", _RO, "bytes of one operation", MAX_LENGTH),
    Register(0x01C, "QUEUES", _RO, "how many there are", QUEUES),
    Register(0x020, "FAULT", _W1C, "the first fault since cleared, 0 none; write ones to clear"),
    Register(0x024, "FAULT_KEY", _RO, "its protection key"),
    Register(0x028, "FAULT_ADDRESS", _RO, "its address", 0, 2),
    Register(0x030, "FAULT_COUNT", _RO, "faults since the reset"),
    Register(0x034, "KEYS", _RO, "protection keys that the slice has", None),
    Register(0x038, "KEY_SELECT", _RW, "which of them KEY shows, from 0"),
    Register(0x03C, "KEY", _RO, "the key selected; all ones for none", None),
    Register(0x040, "SERIAL", _RO, "of the card, text", None, 16),
    Register(0x080, "SLICE", _RO, "id of the slice, text", None, 16),
    Register(0x0C0, "CAPABILITY", _RO, "what it is for, text", None, 16),
    Register(0x100, "PIECES", _RO, "pieces of card memory that it has", None),
    Register(0x104, "PIECE_SELECT", _RW, "which of them the next two show, from 0"),
    Register(0x108, "PIECE_START", _RO, "card address of the piece; all ones for none", None, 2),
    Register(0x110, "PIECE_SIZE", _RO, "its bytes; 0 for none", None, 2),
    Register(0x118, "CORES", _RO, "processing cores", None),
    Register(0x11C, "UNITS", _RO, "accelerator units", None),
    Register(0x120, "BANDWIDTH", _RO, "limit, Mbit/s; 0 none", None),
    Register(0x128, "DMA_READ", _RO, "bytes read by DMA since the function came", None, 2),
    Register(0x130, "DMA_WRITTEN", _RO, "bytes written by DMA", None, 2),
    Register(0x138, "DMA_REFUSED", _RO, "DMA accesses that were refused", None),
    Register(0x140, "MAC", _RO, "net.vf: the address, first byte lowest; else 0", None, 2),
    Register(0x148, "FRAMES_DROPPED", _RO, "net.vf: frames for which there was no room", None),
    *_queue(0),
    *_queue(1),
))  # fmt: skip


def identify_management() -> Identity:
    """Of the management function."""
    return Identity(VENDOR, MANAGEMENT_DEVICE, _ACCELERATOR, VENDOR, 1)


def identify_slice(capability: str) -> Identity:
    """Of a slice's function; its class follows what it is for."""
    class_code = _CLASSES.get(capability.split(".")[0], _ACCELERATOR)
    return Identity(VENDOR, SLICE_DEVICE, class_code, VENDOR, 2)
