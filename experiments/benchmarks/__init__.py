"""Speed: updates, evaluation, generation and kernels, as ratios measured in one run."""
