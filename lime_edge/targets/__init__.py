"""Targets and devices: what a bundle can be exported for."""
