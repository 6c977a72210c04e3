"""Everything that is measured, and the program that measures it: ``python -m benchmarks.run --help``."""
