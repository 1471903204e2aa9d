"""Links to offload cards.

`wire` (what moves messages) · `streamwire` (over a stream) · `doors` (where that is: a socket, a
mailbox) · `witness` (believes nothing) · `link` (`ports.CardLink`) · `handlers` (steps) ·
`conformance` (a suite for makers of cards).
"""
