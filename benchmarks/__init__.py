"""Measurements of this project's own parts, each beside what people use now, in one run on one machine.

Invariant: a benchmark is a module with `main()` that prints one JSON object and nothing else on standard output.
"""
