"""The paper: its published numbers as data, and configurations with its settings."""

from sgworkbench.paper.published import PUBLISHED_TABLES, published
from sgworkbench.paper.settings import PAPER_CONFIGS, paper_settings

__all__ = ["PAPER_CONFIGS", "PUBLISHED_TABLES", "paper_settings", "published"]
