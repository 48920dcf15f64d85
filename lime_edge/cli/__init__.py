"""The command line: one file per command."""

import sys


def main() -> None:
    """Entry point; see app.main. Ctrl-C while the commands are imported ends it without a trace, as later."""
    try:
        from lime_edge.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
