"""A card's management mailbox over ivshmem-doorbell, a device that every QEMU has.

`wire` (messages of a server to its clients) · `server` (the socket; who comes and goes, and who
rings) · `maps` (the shared memory) · `sharedmailbox` (one host's) · `service` (all hosts of a
card). The mailbox itself, its rings and the desk behind them are those of `shim.cardpci`.

There is no DMA here and the configuration space is QEMU's: slices have no functions on this
transport.

Protocol: QEMU, docs/specs/ivshmem-spec.rst (7.2).
"""
