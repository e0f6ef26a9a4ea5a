"""Rules that say which norms are outlying, and the line that each draws."""

from .cut import Cut
from .rules import RULES, Rule, apply_rule, resolve_rule, rule_name

__all__ = ["RULES", "Cut", "Rule", "apply_rule", "resolve_rule", "rule_name"]
