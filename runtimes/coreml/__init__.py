"""Core ML, and the interpreter that proves its programs elsewhere."""
