"""Rules that say which norms are outlying, and the line that each draws."""

from .rules import RULES, Rule, apply_rule, resolve_rule, rule_name
from .threshold import Threshold

__all__ = ["RULES", "Rule", "Threshold", "apply_rule", "resolve_rule", "rule_name"]
