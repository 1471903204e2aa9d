"""PCIe functions of the host, through sysfs, /proc and udev."""
