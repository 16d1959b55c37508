"""Downstream tasks without the lm-evaluation-harness: items in files, a policy beside other controllers."""
