"""Object discovery without labels: LOST and TokenCut under any model, and CorLoc of what they find."""

from .annotations import BoxedImage, boxed_scenes, read_coco, read_voc
from .boxes import DiscoveredObject
from .evaluating import Sweep, evaluate_discovery
from .normalised_cut import TokenCutObject, tokencut, tokencut_batch
from .running import discover
from .scoring import DiscoveryReport, DiscoveryRow, Share, corloc
from .seed_expansion import LostObject, lost, lost_batch

__all__ = [
    "BoxedImage",
    "DiscoveredObject",
    "DiscoveryReport",
    "DiscoveryRow",
    "LostObject",
    "Share",
    "Sweep",
    "TokenCutObject",
    "boxed_scenes",
    "corloc",
    "discover",
    "evaluate_discovery",
    "lost",
    "lost_batch",
    "read_coco",
    "read_voc",
    "tokencut",
    "tokencut_batch",
]
