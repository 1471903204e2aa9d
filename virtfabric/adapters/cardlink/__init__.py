"""Links to offload cards.

`wire` (what moves messages) · `socketwire` (over a Unix socket) · `witness` (believes nothing)
· `link` (`ports.CardLink`) · `handlers` (steps) · `conformance` (a suite for makers of cards).
"""
