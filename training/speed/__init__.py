"""What benchmark.py measures with."""
