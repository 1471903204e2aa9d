"""The nouns: frozen values that every other room shares. No I/O, no clock, no randomness, no log."""
