"""`megatrain serve`: answer requests of OpenAI's API with the model of a run, or of a Hugging Face directory."""

import argparse
import os
import socket
import sys
from argparse import Namespace
from ipaddress import ip_address
from pathlib import Path

from megatrain.cli.actions import run_here
from megatrain.cli.options import Parser
from megatrain.config.errors import UserError
from megatrain.config.paths import expanded
from megatrain.config.ranges import Range
from megatrain.runtime.packages import require_package
from megatrain.runtime.processes import Processes, is_started
from megatrain.serve.limits import Limits

NUMBERS = {
    "port": Range(at_least=0, at_most=65535),
    "batch": Range(at_least=1, at_most=65536),
    "queue": Range(at_least=0, at_most=65536),
    "max_tokens": Range(at_least=1),
    "cache_gib": Range(above=0),
    "body_mib": Range(above=0, at_most=1024),
    "read_seconds": Range(above=0),
    "request_seconds": Range(above=0),
    "drain_seconds": Range(at_least=0),
}


def run(argv: list[str]) -> int:
    """Answer requests until a signal comes; return the exit code."""
    options = parse(argv)
    if is_started():
        raise UserError("serve: one process answers all requests; start it without torchrun or srun")
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require_package(package, "megatrain serve")
    return _serve(options)


def parse(argv: list[str]) -> Namespace:
    """Return the options of a command line.

    Raises:
        UserError: one is unknown, or out of its range.
    """
    options = _parser().parse_intermixed_args(argv)
    for name, allowed in NUMBERS.items():
        value = getattr(options, name)
        if value is not None and (rule := allowed.broken_rule(value)):
            raise UserError(f"serve: --{name.replace('_', '-')} {value}: {rule}")
    return options


def _parser() -> Parser:
    limits = Limits()
    parser = Parser("serve")
    parser.add_argument("run")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name")
    parser.add_argument("--api-keys", metavar="FILE")
    parser.add_argument("--batch", type=int, default=limits.batch)
    parser.add_argument("--queue", type=int, default=limits.queue)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--cache-gib", type=float, default=1.0)
    parser.add_argument("--pooling", choices=("mean", "last"), default="mean")
    parser.add_argument("--body-mib", type=float, default=limits.body_bytes / 2**20)
    parser.add_argument("--read-seconds", type=float, default=limits.read_seconds)
    parser.add_argument("--request-seconds", type=float, default=limits.request_seconds)
    parser.add_argument("--drain-seconds", type=float, default=limits.drain_seconds)
    parser.add_argument("--average", action=argparse.BooleanOptionalAction)
    return parser


def _serve(options: Namespace) -> int:
    from megatrain.serve.keys import VARIABLE, read_keys
    from megatrain.serve.server import open_socket, serve, url_of
    from megatrain.serve.service import Service
    from megatrain.train.inference import load_trained

    keys = read_keys(os.environ, None if options.api_keys is None else Path(expanded(options.api_keys)))
    directory = run_here(options.run)
    opened = open_socket(
        options.host, options.port
    )  # before the model is loaded: a taken port is said at once
    if not keys and not _is_loopback(opened):
        print(
            f"megatrain: serve: all who reach {url_of(opened)} may ask: set {VARIABLE}, or give --api-keys FILE",
            file=sys.stderr,
        )
    trained = load_trained(directory, Processes(), average=options.average)
    limits = Limits(
        batch=options.batch,
        queue=options.queue,
        max_tokens=options.max_tokens,
        body_bytes=int(options.body_mib * 2**20),
        read_seconds=options.read_seconds,
        request_seconds=options.request_seconds,
        drain_seconds=options.drain_seconds,
    )
    name = options.name or directory.absolute().name
    service = Service(
        trained, directory, name=name, limits=limits, cache_gib=options.cache_gib, pooling=options.pooling
    )
    blocks = service.engine.generation.runner.cache.n_blocks
    step = "" if trained.step is None else f", step {trained.step}"
    print(f"{name}{step}: contexts of {trained.context} tokens, a cache of {blocks} blocks", file=sys.stderr)
    serve(service, opened, keys=keys, on_ready=lambda: print(url_of(opened), flush=True))
    return 0


def _is_loopback(opened: socket.socket) -> bool:
    return ip_address(opened.getsockname()[0].partition("%")[0]).is_loopback
