"""The benchmark on another machine: reach a device, make it ready, bring what it lacks, run, bring the answer back."""
