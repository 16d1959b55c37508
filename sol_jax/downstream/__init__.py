"""Tasks: how likely given continuations are under a controller, and the lm-evaluation-harness."""
