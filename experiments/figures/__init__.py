"""One module per figure, each drawn from the CSVs under `experiments/results`; `__main__` draws them all."""
