"""Judges: who says whether a response refuses, complies, is safe or unsafe."""

from sgworkbench.evaluation.judges.base import (
    VERDICTS,
    Judge,
    Verdict,
    VerdictName,
    get_judge,
    judge_names,
    register_judge,
)
from sgworkbench.evaluation.judges.refusal import RefusalJudge, RefusalWeights, default_weights
from sgworkbench.evaluation.judges.substrings import (
    ARDITI_SUBSTRINGS,
    GCG_SUBSTRINGS,
    JAILBREAKBENCH_SUBSTRINGS,
    SubstringJudge,
)
from sgworkbench.evaluation.judges.table import judge_table

__all__ = [
    "ARDITI_SUBSTRINGS",
    "GCG_SUBSTRINGS",
    "JAILBREAKBENCH_SUBSTRINGS",
    "VERDICTS",
    "Judge",
    "RefusalJudge",
    "RefusalWeights",
    "SubstringJudge",
    "Verdict",
    "VerdictName",
    "default_weights",
    "get_judge",
    "judge_names",
    "judge_table",
    "register_judge",
]
