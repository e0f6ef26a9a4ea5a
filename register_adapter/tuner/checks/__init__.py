"""What is checked before an adapter is put on a model: its place, its base, its heads, an anatomy by hand."""

from .dry_run import check_anatomy
from .placing import by_block, check_placement, check_task, check_units, checked_identity, heads_of
from .saved_heads import check_saved_heads, lost_heads

__all__ = [
    "by_block",
    "check_anatomy",
    "check_placement",
    "check_saved_heads",
    "check_task",
    "check_units",
    "checked_identity",
    "heads_of",
    "lost_heads",
]
