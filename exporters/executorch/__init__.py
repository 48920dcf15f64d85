"""ExecuTorch: .pte programs."""
