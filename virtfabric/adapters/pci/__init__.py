"""PCIe functions for real: what the kernel shows below /sys/bus/pci, and the steps that change it.

Roots are arguments everywhere, so that a tree made for a test is worked on by the same code.
"""
