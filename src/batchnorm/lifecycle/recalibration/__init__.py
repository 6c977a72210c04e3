"""The parts of ``recalibrate``: the model under observation, dependence, the passes over the batches, the report."""
