"""The commands: thin clients of the D-Bus API, and what is local to a host."""
