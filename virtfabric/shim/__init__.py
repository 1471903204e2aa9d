"""What stands in for machines that are not there: private hosts, guest images, emulated cards.

Nothing here may be imported by the agent itself; the shim serves tests, demos and labs.
"""
