"""The firmware of an emulated card: slices, their state through loss of power, images.

`statelog` (what is kept) · `programming` (images) · `firmware` (decides and answers) · `hostdesk`
(decides about hosts) · `desk` (links to hosts). It decides by `policy`, like the agent; transports
and the PCI device come above.
"""
