"""A card's PCI functions: one for management, one for each slice that is granted.

`registers` (maps as data) · `mailbox` and `management` (bytes for the firmware's desk) ·
`descriptors`, `queue`, `worker` and `slicefunction` (rings in guest memory) · `dma` (counted, cut
by a reset) · `cardmemory` (behind protection keys) · `engines` (what computes) · `card` (joins all
that with a firmware). The server of the bus is `shim.vfiouser`; `shim.ivshmem` has the mailbox once
more, for other QEMUs. docs/card-protocol.md says all of it for those who build a card.
"""
