"""The benchmark: time, memory and energy of a bundle on this machine."""
