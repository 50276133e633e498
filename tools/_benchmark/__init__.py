"""Helpers of benchmark.py: cases of parts and whole models, timing, reports."""
