"""A server of vfio-user: a PCI function of this process, which QEMU (10.1 or newer) plugs.

`wire` (messages on a socket) · `bodies` (what is in them) · `memory` (the guest's, for DMA) ·
`interrupts` (eventfds) · `config` (configuration space as data) · `function` (what a device is to
be) · `session` (one client) · `server` (the socket). It knows nothing of cards.

Protocol: QEMU, docs/interop/vfio-user.rst (0.9.2); structures: Linux, include/uapi/linux/vfio.h.
"""
