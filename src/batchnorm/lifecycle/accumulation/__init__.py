"""The parts of ``exact_accumulation``."""
