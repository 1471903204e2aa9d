"""CXL memory: what there is of it, by sysfs; changed by the tools of ndctl."""
