"""Each role of `ports` for real and simulated."""
