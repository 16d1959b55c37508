"""Learning: the policy, one episode, its reward, and one update.

Read `policy`, `rollout` (one episode under one controller), `rewards` and `grpo` (the signal and the loss),
then `train_step` (an update as one pure function).
"""
