"""Benchmarks of speed and memory, on a CPU or on one GPU.

Run a benchmark with ``python -m benchmarks.NAME``; NAME is ``selection``, ``fit``, ``generation``, ``extraction``,
``scaling`` or ``harness``. docs/performance.md describes the benchmarks and their results.

All benchmarks but ``harness`` need only torch and transformers: they use random weights and download nothing.
"""
