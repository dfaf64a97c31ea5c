"""The runner of a plan, by the harness of the plan."""

from __future__ import annotations

from pathlib import Path

from lmms_mtv.experiments.compare import CellRunner
from lmms_mtv.experiments.plan import LM_EVAL, Plan
from lmms_mtv.harness.arms import check_early


def load(plan: Plan, library: Path, reuse: bool = True) -> CellRunner:
    """Load the model and the tasks of a plan into the harness of the plan.

    The harness is imported here, after the arguments are checked: the import takes longer than the check.

    Args:
        plan: the plan.
        library: folder of the vector library.
        reuse: True takes a vector of the same recipe from the library.

    Raises:
        ArgumentError: a task or an argument of any arm is unknown. Nothing has run then.
    """
    if plan.harness == LM_EVAL:
        from lmms_mtv.harness.lm.plan_runner import LmPlanRunner

        return LmPlanRunner(plan, library, reuse)
    check_early(plan.model, plan.arms)
    from lmms_mtv.harness.lmms.plan_runner import PlanRunner

    return PlanRunner(plan, library, reuse)
