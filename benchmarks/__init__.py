"""The registry of everything that is measured, and the program that measures it: see docs/performance.md."""
