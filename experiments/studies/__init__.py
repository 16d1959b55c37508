"""Questions the paper does not answer, put to policies and their evaluations: each module writes a CSV."""
