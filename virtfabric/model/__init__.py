"""The nouns: frozen values that all other rooms share. No I/O, no clock, no randomness, no log."""
