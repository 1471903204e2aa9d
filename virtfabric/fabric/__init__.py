"""Many hosts: manager, directory, leases, lending. Empty until its issue."""
