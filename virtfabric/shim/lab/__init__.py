"""The nested lab: a whole emulated host that runs libvirt, QEMU, KVM guests and this agent."""
