"""Self-Optimizing Language Models (arXiv 2605.10875) in JAX.

Array names end in their shape, one letter an axis, read from this table:

    B   sequences of a batch               D    hidden size of the LLM
    W   episodes that share one prefill    H    query heads, Hkv key/value heads
    K   schedules of one episode           d    size of one head
    T   decode steps of an episode         F    width of the MLP
    S   tokens in the prefix               V    vocabulary
    P   pages of the KV cache              L    decoder layers
    A   joint actions                      X    efficiency axes (three as shipped)
    N   any length                         E    width of the policy

so `logits_KxTxA` has one row of action logits per schedule and step.  Functions are written for one
sequence and one schedule wherever they can be, and batched by `jax.vmap`.

Reading order: `axis`, `axes` (what an action is), `llama` (the frozen model), `policy`, `rollout` (one
episode), `rewards` and `grpo` (the learning signal), `train` (the loop).
"""
