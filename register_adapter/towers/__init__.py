"""Vision towers: the table of families, the search for a tower in a model, and which base an adapter belongs to."""

from .anatomy import Anatomy
from .families import FAMILIES, REFUSED
from .identity import TowerIdentity
from .libraries import STACKS
from .tower import Tower, find_tower

__all__ = ["FAMILIES", "REFUSED", "STACKS", "Anatomy", "Tower", "TowerIdentity", "find_tower"]
