"""What a policy is compared with: schedules that know nothing, and heuristics that need no training."""
