"""The paper's figures and ours, drawn from committed CSVs: `python -m experiments.figures`."""
