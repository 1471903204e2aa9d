"""Pools of huge pages: what they hold, what is ours of them, and the step that changes them."""
