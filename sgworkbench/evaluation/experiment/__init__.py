"""Experiments: arms x prompt sets from one configuration, with judges, controls, statistics and costs."""

from sgworkbench.evaluation.experiment.config import ExperimentConfig
from sgworkbench.evaluation.experiment.config_files import example_names
from sgworkbench.evaluation.experiment.result import ExperimentResult
from sgworkbench.evaluation.experiment.run import plan_table, run_experiment

__all__ = ["ExperimentConfig", "ExperimentResult", "example_names", "plan_table", "run_experiment"]
