"""What safety steering costs: answers to harmless prompts, plain text, knowledge, and the method's own quick checks."""

from sgworkbench.evaluation.costs.quick_checks import SubspaceShare, performance_kept, subspace_share
from sgworkbench.evaluation.costs.spec import CostSpec
from sgworkbench.evaluation.costs.summary import Costs, measure_costs

__all__ = ["CostSpec", "Costs", "SubspaceShare", "measure_costs", "performance_kept", "subspace_share"]
