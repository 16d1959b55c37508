"""Runs that several processes must refuse, one after the other in the same processes: run by `test_hosts`.

python tests/parallel/refused_runs.py HOSTS RUNS, both JSON: fields of `HostOptions`; and [config, workdir] of
each run.  Relative workdirs lie in the folder that the process stands in.
"""

import functools
import json
import pathlib
import sys

from sol_jax import hosts
from sol_jax.errors import exits_on_user_error
from sol_jax.hosts import AgreedError, HostOptions, joined, together
from sol_jax.runs.config import RunConfig
from sol_jax.training.loop import train


@exits_on_user_error
def main() -> None:
    options, runs = map(json.loads, sys.argv[1:])
    hosts.SHARED_SECONDS = 1
    with joined(HostOptions(**options)):
        for n, (config, workdir) in enumerate(runs):
            try:
                train(together(functools.partial(RunConfig.from_dict, config)), pathlib.Path(workdir))
            except AgreedError as error:
                if n == len(runs) - 1:
                    raise
                print(f"{n}: {error}", flush=True)


if __name__ == "__main__":
    main()
