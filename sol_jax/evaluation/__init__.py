"""A policy beside controllers of the same cost, on text that is given.

`comparison` says what is compared and makes the rows, `scoring` and `sweep` play schedules, `score_cache`
keeps what is scored, `results_csv` writes rows, `statistics` has the intervals.
"""
