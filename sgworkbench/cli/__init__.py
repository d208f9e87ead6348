"""The command line: thin commands over the same functions that notebooks call."""

from sgworkbench.cli import (
    audit,
    calibrate,
    evaluate,
    figures,
    gap_report,
    judge,
    models,
    protocols,
    steering,
    study,
    sweep,
    vectors,
)
from sgworkbench.cli.common import app

__all__ = [
    "app",
    "audit",
    "calibrate",
    "evaluate",
    "figures",
    "gap_report",
    "judge",
    "main",
    "models",
    "protocols",
    "steering",
    "study",
    "sweep",
    "vectors",
]


def main() -> None:
    """Run the command line."""
    app()
