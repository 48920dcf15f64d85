"""Core ML: .mlpackage programs."""
