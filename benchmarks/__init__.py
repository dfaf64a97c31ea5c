"""Speed and memory, on a CPU or on one GPU: ``python -m benchmarks.NAME``, with NAME ``selection``, ``fit``,
``generation``, ``extraction``, ``scaling`` or ``harness``.

What each measures and what came out is in docs/performance.md.

Everything but ``harness`` needs torch and transformers alone: random weights, no downloads, no harness.
"""
