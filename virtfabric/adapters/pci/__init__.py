"""PCIe functions of this host: seen, watched, recorded."""
