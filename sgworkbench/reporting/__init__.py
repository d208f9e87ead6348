"""Reports: a study's numbers and figures as files and as one self-contained page."""

from sgworkbench.reporting.study_report import write_study

__all__ = ["write_study"]
