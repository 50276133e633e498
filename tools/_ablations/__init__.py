"""Helpers of ablation_table.py: rows, their differences, runs on the embedded shapes, reports."""
