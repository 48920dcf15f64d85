"""Core AI: .aimodel programs."""
