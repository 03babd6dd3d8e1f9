"""What the installation brings to start runs with: `ogdopt recipes`, and the path of one, `ogdopt recipes NAME`."""

from __future__ import annotations

from ogdopt_harness.commands.usage import recipe_list
from ogdopt_harness.config.commands import NoOptions
from ogdopt_harness.config.options import meant, nearest
from ogdopt_harness.config.recipes import launch_files, recipes


def main(config: NoOptions, name: str | None) -> None:
    """List the recipes and launch files, or print the path of one. Raises ValueError for a name of none."""
    files = recipes() | launch_files()
    if name is None:
        print(recipe_list())
    elif name in files:
        print(files[name])
    else:
        likely = meant(nearest(name, files), "")
        raise ValueError(f"there is no recipe or launch file {name!r}{likely} (`ogdopt recipes` lists them)")
