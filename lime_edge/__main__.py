"""python -m lime_edge: the command line, where its script is not on the PATH."""

from lime_edge.cli import main

main()
