"""What tokens know and what registers do, with figures and how sure they are."""

from .estimate import Estimate
from .probes import ProbeReport, probe_tokens
from .registers import RegisterReport, analyse_registers

__all__ = ["Estimate", "ProbeReport", "RegisterReport", "analyse_registers", "probe_tokens"]
