"""Benchmarks of speed and memory, on a CPU or on one GPU.

Run a benchmark with ``python -m benchmarks.NAME``; NAME is ``selection``, ``fit``, ``generation``, ``extraction``,
``scaling`` or ``harness``. ``exactness`` checks that a device gives the numbers of the CPU, and ``gpu`` runs all that
there is to run on a GPU. docs/performance.md describes the benchmarks and their results.

All benchmarks but ``harness`` need only torch and transformers: they use random weights and download nothing.
"""
