"""One script per figure or benchmark; each reads or writes CSVs and says how to run it."""
