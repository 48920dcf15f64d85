"""The export: a checkpoint becomes a bundle. Needs the packages of a workstation."""
