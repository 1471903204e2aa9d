"""A whole host in memory, behind the same ports as the real one: for tests and `--simulate`."""
