"""virtfabric: changes the hardware under running libvirt guests."""

__version__ = "0.1.0"
