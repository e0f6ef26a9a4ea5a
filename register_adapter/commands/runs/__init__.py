"""What the commands do, without their flags and tables; imported when a command runs, not for its help."""

from .audit import AuditArguments, run_audit
from .demo import DemoArguments, run_demo
from .fit import FitArguments, run_fit
from .probe import ProbeArguments, run_probes
from .study import StudyArguments, run_study

__all__ = [
    "AuditArguments",
    "DemoArguments",
    "FitArguments",
    "ProbeArguments",
    "StudyArguments",
    "run_audit",
    "run_demo",
    "run_fit",
    "run_probes",
    "run_study",
]
