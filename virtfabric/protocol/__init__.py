"""Wire formats, pure: bytes to messages and back; no sockets."""
