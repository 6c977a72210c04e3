"""Section 4.2's figures, tables and page, drawn from ``metrics.Metrics`` and from nothing else."""
