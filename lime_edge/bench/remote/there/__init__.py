"""What runs on the device before lime_edge is there: the standard library alone, sent as one zip file (pack.py)."""
