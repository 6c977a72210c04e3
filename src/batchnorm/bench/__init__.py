"""Speed and memory, measured against PyTorch and against a copy: what ``batchnorm bench`` and ``make bench`` run.

``cases`` says what is measured, ``problem`` makes its data and knows the right answer, ``peers`` are those who compute
it, ``measure`` times them in turn, ``run`` brings these together into the rows of ``results``.
"""
