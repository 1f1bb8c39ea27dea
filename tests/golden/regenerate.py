"""Write all golden texts anew: `python tests/golden/regenerate.py`, then read the diff."""

from pathlib import Path

from megatrain.cli.compose import compose
from megatrain.cli.recipes import recipe_table
from megatrain.config.text import to_yaml

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parents[1] / "conf" / "experiment"


def main() -> None:
    for old in HERE.glob("*.yaml"):
        old.unlink()
    (HERE / "default.yaml").write_text(to_yaml(compose([])), encoding="utf-8")
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        text = to_yaml(compose([f"experiment={path.stem}"]))
        (HERE / path.name).write_text(text, encoding="utf-8")
    (HERE / "recipes.md").write_text(recipe_table(), encoding="utf-8")


if __name__ == "__main__":
    main()
