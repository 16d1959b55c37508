"""Downstream tasks without the lm-evaluation-harness."""
