"""Small models whose artifacts grew by themselves, and the images that they grew on."""

from .growth import Drawn, Ensemble, losses, measure, weighted_error
from .mosaics import TILE_KINDS, MosaicDataset, Mosaics, MosaicTask
from .objectives import OBJECTIVES, objective_of
from .packaged import load_grown, read_grown, save_grown
from .recipes import RECIPES, TWINS, GrownModel, Recipe, build

__all__ = [
    "OBJECTIVES",
    "RECIPES",
    "TILE_KINDS",
    "TWINS",
    "Drawn",
    "Ensemble",
    "GrownModel",
    "MosaicDataset",
    "MosaicTask",
    "Mosaics",
    "Recipe",
    "build",
    "load_grown",
    "losses",
    "measure",
    "objective_of",
    "read_grown",
    "save_grown",
    "weighted_error",
]
