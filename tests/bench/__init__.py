"""Benchmarks: each prints one JSON object on its last line, and never asserts on time."""
