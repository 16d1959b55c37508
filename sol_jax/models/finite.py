"""What a model computes must be numbers: a NaN or an infinity never becomes a token or a score."""

import numpy as np

from sol_jax.errors import UserError


def no_numbers(what: str) -> UserError:
    """The error that says so of a text, a batch or a request."""
    return UserError(
        f"the model or the policy gives a NaN or an infinity for {what}; its weights do not fit its config, "
        "or are too large for its dtype: try another --dtype (config.model.dtype), or fetch the files again"
    )


def finite(what: str, values: np.ndarray) -> np.ndarray:
    """`values`; raises `UserError`, naming what they are of, if one of them is no number."""
    if not np.isfinite(values).all():
        raise no_numbers(what)
    return values
