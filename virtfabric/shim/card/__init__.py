"""An emulated card as a process: its description, its hosts on a socket, and its log.

`description` (a TOML file) · `server` (links over a Unix socket) · `story` (what the log says).
The firmware below knows none of this.
"""
