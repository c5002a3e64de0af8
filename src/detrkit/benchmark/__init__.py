"""Measuring models: each side in a process of its own, in turns, beside what the machine could do.

:mod:`~detrkit.benchmark.sides` is what a process runs, :mod:`~detrkit.benchmark.turns` lets processes take
turns, :mod:`~detrkit.benchmark.machine` says what they ran on, :mod:`~detrkit.benchmark.models` makes models
and counts their work, and :mod:`~detrkit.benchmark.report` makes rows of it. ``detrkit benchmark`` and the
scripts in the repository's ``benchmarks/`` are built of these.
"""
