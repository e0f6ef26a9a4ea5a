"""What the package ships to be tried on without a network: scenes, a small ViT, planted artifacts."""

from .control import random_registers
from .grown import MosaicDataset, MosaicTask, load_grown
from .plant import Planting, plant_artifacts
from .scenes import COLOURS, LABELS, SHAPES, Scene, SceneDataset, SceneObject, make_scene, photographs
from .vit import load_image_processor, load_planted_vit, load_shipped, load_vit

__all__ = [
    "COLOURS",
    "LABELS",
    "SHAPES",
    "MosaicDataset",
    "MosaicTask",
    "Planting",
    "Scene",
    "SceneDataset",
    "SceneObject",
    "load_grown",
    "load_image_processor",
    "load_planted_vit",
    "load_shipped",
    "load_vit",
    "make_scene",
    "photographs",
    "plant_artifacts",
    "random_registers",
]
