"""Figures, tables and pages, drawn from a ``metrics.Metrics`` and from nothing else."""
