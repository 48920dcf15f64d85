"""What runs in torch: the compiled model, which is the oracle of every exporter."""
