"""From folded weights to integers, and how much survives."""
