"""What `tools/write_phone_vectors.py` is made of: tiny bundles, and what Python's sessions answer on them."""
