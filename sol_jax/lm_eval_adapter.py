"""The lm-evaluation-harness:  python -m sol_jax.lm_eval_adapter --model sol_jax --tasks arc_easy

A public command; the model is in `sol_jax.downstream.lm_eval_adapter`, and needs the extra `lm_eval`.
"""

import sys

if __name__ == "__main__":
    try:
        from sol_jax.downstream.lm_eval_adapter import main
    except ImportError as missing:
        print(f"error: {missing}", file=sys.stderr)
        sys.exit(2)
    main()
