"""Pure functions: folding, routing, quantization, the variants."""
