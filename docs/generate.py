"""Pages made from the code when the site is built, so that they cannot go stale: config keys, presets, recipes, API.

mkdocs calls `on_files` (see `hooks` in mkdocs.yml). Nothing here imports torch.
"""

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from megatrain.cli.compose import compose
from megatrain.cli.conf import group_options, shipped_dir
from megatrain.config.docs import Key, describe
from megatrain.launch.config import CLUSTERS, Cluster
from megatrain.models.flops import n_params
from megatrain.train.config import Config

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "launch": ROOT / "megatrain" / "launch",
    "compress": ROOT / "megatrain" / "compress",
    "evaluate": ROOT / "megatrain" / "evaluate",
    "serve": ROOT / "megatrain" / "serve",
    "train": ROOT / "megatrain" / "train",
    "engines": ROOT / "megatrain" / "engines",
    "parallel": ROOT / "megatrain" / "parallel",
    "models": ROOT / "megatrain" / "models",
    "nn": ROOT / "megatrain" / "nn",
    "optim": ROOT / "megatrain" / "optim",
    "data": ROOT / "megatrain" / "data",
    "checkpoint": ROOT / "megatrain" / "checkpoint",
    "observe": ROOT / "megatrain" / "observe",
    "resilience": ROOT / "megatrain" / "resilience",
    "runtime": ROOT / "megatrain" / "runtime",
    "config": ROOT / "megatrain" / "config",
    "megatrain_kernels": ROOT / "kernels" / "megatrain_kernels",
}
"""Page of the API -> its package. The command (`megatrain/cli`) is documented by its own help."""
SHORT_TYPES = {"an integer": "int", "a number": "float", "true or false": "bool", "text": "str"}
"""The loader's words for types, and the shorter ones of the tables."""
RUN_TABLE = "| choose | what | global batch | optimizer, rate, schedule | steps |\n|---|---|---|---|---|\n"
GENERATED = "<!-- Made by docs/generate.py; edit that, or the source it reads. -->\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    pages = {"config.md": config_page(), "presets.md": presets_page(), "api/index.md": api_index()}
    pages["cluster-keys.md"] = clusters_page()
    pages |= {f"api/{name}.md": api_page(name) for name in PACKAGES}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=GENERATED + text))
    # griffe warns about its parser's doubts, which are no faults of the site
    logging.getLogger("mkdocs.plugins.griffe").setLevel(logging.ERROR)
    return files


def config_page() -> str:
    """Return the page of every config key, with type, default and meaning, in one table a section."""
    sections: dict[str, list[Key]] = {}
    for key in describe(Config):
        sections.setdefault(key.path.partition(".")[0] if "." in key.path else "", []).append(key)
    parts = [
        "# Every config key",
        "A key is set on the command line as `key=value`, or in a YAML file. `megatrain train --cfg job` prints the "
        "config that a command line gives, `megatrain train --cfg schema` the JSON schema. The defaults below are "
        "those of the config classes; a group's option or an experiment may set others.",
        "Keys under `model`, `optim` and `schedule` belong to the option that the group chooses: "
        "`optim=muon optim.ns_steps=6`.",
    ]
    groups = group_options()
    for name, keys in sorted(sections.items(), key=lambda item: bool(item[0])):
        parts.append(f"## {f'`{name}`' if name else 'The run as a whole'}")
        if options := groups.get(name):
            parts.append(f"Options of the group: {', '.join(f'`{name}={option}`' for option in options)}.")
        parts.append("| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(map(_row, keys)))
    return "\n\n".join(parts) + "\n"


def clusters_page() -> str:
    """Return the page of every key of a cluster (`conf/cluster/`): those of all kinds, and those of each."""
    head = "| key | type | default | meaning |\n|---|---|---|---|\n"
    common = describe(Cluster)
    known = {key.path for key in common}
    parts = [
        "# Every key of a cluster",
        "What `megatrain launch` needs to know of a site; [Clusters](clusters.md) tells how it is used. A key stands "
        "in `conf/cluster/NAME.yaml`, with `kind: KIND`, or is given as a flag: `gpus_per_node: 4` is "
        "`--gpus-per-node 4`, `exclusive: false` is `--no-exclusive`.",
        "## All kinds",
        head + "\n".join(map(_row, common)),
    ]
    for kind, cls in CLUSTERS.items():
        own = [key for key in describe(cls) if key.path not in known | {"kind"}]
        if own:
            parts += [f"## `{kind}`", head + "\n".join(map(_row, own))]
    return "\n\n".join(parts) + "\n"


def presets_page() -> str:
    """Return the page of all model presets and all recipes (`conf/model`, `conf/experiment`)."""
    rows = []
    for name in group_options()["model"]:
        cfg = compose([f"model={name}"]).model
        total, active = n_params(cfg), n_params(cfg, active=True)
        size = _count(total) if total == active else f"{_count(total)} ({_count(active)} active)"
        heads = f"{cfg.n_heads} / {cfg.kv_heads}"
        cells = (f"`{name}`", _first_comment("model", name), size, cfg.n_layers, cfg.hidden_size, heads)
        rows.append(_cells(*cells, f"{cfg.vocab_size:,}", f"{cfg.max_seq_len:,}"))
    groups = group_options()
    experiments = [_run_row("experiment", name) for name in groups["experiment"]]
    recipes = [_run_row("model", name) for name in groups.get("recipe", ()) if name in groups["model"]]
    parts = [
        "# Presets and recipes",
        "A **preset** is the architecture of one model: `model=llama3_8b`. Its **recipe** is how such a model is "
        "usually trained: batch, rate, schedule, steps. An **experiment** is a whole run: `experiment=smoke`. All are "
        "files under `conf/`; your own go into a directory named by `--config-dir`, in folders of the same names.",
        "## Presets",
        "Each size is built in the tests and has the published number of parameters. Context is the longest "
        "sequence that the model is defined for; `seq_len` sets what a run trains on.",
        "| preset | model | parameters | layers | width | heads / KV | vocabulary | context |\n"
        "|---|---|---|---|---|---|---|---|\n" + "\n".join(rows),
    ]
    if recipes:
        parts += [
            "## Recipes",
            "What a preset brings with it; any key may be overridden.",
            RUN_TABLE + "\n".join(recipes),
        ]
    return "\n\n".join([*parts, "## Experiments", RUN_TABLE + "\n".join(experiments)]) + "\n"


def _run_row(group: str, name: str) -> str:
    """Return the row of the run that `group=name` composes to."""
    cfg = compose([f"{group}={name}"])
    batch = f"{cfg.global_batch_size} x {cfg.seq_len} = {_count(cfg.global_batch_size * cfg.seq_len)} tokens"
    optim = f"{cfg.optim.kind}, {cfg.optim.lr:g}, {cfg.schedule.kind}"
    what = _first_comment("recipe" if group == "model" else group, name)
    return _cells(f"`{group}={name}`", what, batch, optim, f"{cfg.train.steps:,}")


def api_index() -> str:
    """Return the list of packages with the first lines of what each module says of itself."""
    lines = [
        "# API",
        "Everything public, from the docstrings. A package may import only what stands below it in this list; "
        "siblings do not import each other.",
    ]
    for name in PACKAGES:
        documented = [
            (module, path) for module, path in _modules(name) if "kernels" not in name or "." not in module
        ]
        listed = "\n".join(f"| `{module}` | {_summary(path)} |" for module, path in documented)
        lines.append(f"## [{name}]({name}.md)\n\n| module | what it owns |\n|---|---|\n{listed}")
    return "\n\n".join(lines) + "\n"


def api_page(name: str) -> str:
    """Return the page of one package, for mkdocstrings to fill in: every module, or the kernels' public functions."""
    documented = (
        _public_functions() if name == "megatrain_kernels" else [module for module, _ in _modules(name)]
    )
    return f"# {name}\n\n" + "\n\n".join(f"::: {each}" for each in documented) + "\n"


def _public_functions() -> list[str]:
    """Return the full names of what `megatrain_kernels` offers, in the order of its imports."""
    package = ast.parse((PACKAGES["megatrain_kernels"] / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in package.body if isinstance(node, ast.ImportFrom)]
    return [f"{node.module}.{alias.name}" for node in imports for alias in node.names]


def _modules(name: str) -> Iterator[tuple[str, Path]]:
    """Yield dotted name and file of every module of a package that has something public to say."""
    package = PACKAGES[name]
    top = package.parents[len(package.relative_to(ROOT).parts) - 2]  # megatrain/'s parent, or kernels/
    root = top.parent if name != "megatrain_kernels" else package.parent
    for path in sorted(package.rglob("*.py")):
        dotted = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        private = any(part.startswith("_") for part in dotted.split("."))
        if not private and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))):
            yield dotted, path


def _summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return _escaped(" ".join(doc.split("\n\n")[0].split()))


def _first_comment(group: str, name: str) -> str:
    """Return the comment at the top of a config file, without the mark of a package."""
    lines = (shipped_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    said = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            said.append(line.lstrip("# "))
    return _escaped(" ".join(said))


def _row(key: Key) -> str:
    only = f" *{', '.join(key.only)} only.*" if key.only else ""
    kind = key.type
    for words, short in SHORT_TYPES.items():
        kind = kind.replace(words, short)
    return _cells(f"`{key.path}`", _escaped(kind), f"`{key.default}`", _escaped(key.doc) + only)


def _cells(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _count(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;")
