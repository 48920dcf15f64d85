"""Core AI."""
