"""What every verb with a config does: parse, compose, check; then print, sweep or run."""

import json
from collections.abc import Callable

from megatrain.cli.compose import Source, compose
from megatrain.cli.options import parse_options
from megatrain.cli.sweep import plan_sweep, run_sweep
from megatrain.config.docs import json_schema
from megatrain.config.text import to_yaml
from megatrain.train.config import Config


def run_job(verb: str, argv: list[str], job: Callable[[Config], int]) -> int:
    """Run `job` on the config that the command line describes; returns the exit code.

    `--cfg job` prints the config instead, and `--multirun` starts a fresh process for every combination.

    Raises:
        UserError: the command line or a config is wrong; nothing was run then.
    """
    options = parse_options(verb, argv)
    source = Source(options.config_dir, options.config_name)
    if options.cfg == "schema":
        print(json.dumps(json_schema(Config), indent=2))
        return 0
    if options.multirun:
        jobs = plan_sweep(options.overrides, source)
        if options.cfg != "job":
            return run_sweep(verb, jobs, source)
        print("---\n".join(to_yaml(each.cfg) for each in jobs), end="")
        return 0
    cfg = compose(options.overrides, source)
    if options.cfg == "job":
        print(to_yaml(cfg), end="")
        return 0
    return job(cfg)
