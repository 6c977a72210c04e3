"""The parts of ``convert`` and ``revert``."""
