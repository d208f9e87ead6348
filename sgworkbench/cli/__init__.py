"""The command line: thin commands over the same functions that notebooks call."""

from sgworkbench.cli import models, steering, study
from sgworkbench.cli.common import app

__all__ = ["app", "main", "models", "steering", "study"]


def main() -> None:
    """Run the command line."""
    app()
