"""Linear probes of patch tokens: what a place, an image's pixels and its class leave in them."""

from .report import ProbeReport
from .token_probes import probe_tokens

__all__ = ["ProbeReport", "probe_tokens"]
