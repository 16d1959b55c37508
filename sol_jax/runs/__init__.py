"""A run on disk: its config, its checkpoints, its metrics, and the policies that are published from it.

`config` turns a config file into the frozen dataclasses of the rest, `session` loads what it names,
`checkpoints` and `orbax_store` save and restore, `metrics` logs, `policy_files` and `trained_policy` read
policies.
"""
