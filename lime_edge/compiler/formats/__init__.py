"""What the compiler reads and writes."""
