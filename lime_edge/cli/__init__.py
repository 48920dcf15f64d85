"""The command line: one file per command."""

from lime_edge.cli.app import main

__all__ = ["main"]
