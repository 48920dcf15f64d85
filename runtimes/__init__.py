"""Runtimes: one file per engine, each runs one target's artifact. No torch."""
