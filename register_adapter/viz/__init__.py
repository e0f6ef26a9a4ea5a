"""Images of what is inside a model: attention, norms, principal components; as arrays, figures and a page."""

from .colours import principal_colours
from .examples import Example, attention_map, read_examples
from .figures import (
    plot_attention,
    plot_before_after,
    plot_discovery,
    plot_norm_histograms,
    plot_norm_maps,
    plot_pca,
    plot_registers,
)
from .images import ImageInputError
from .maps import ImageMaps, Maps, read_maps
from .page import write_page, write_task_page

__all__ = [
    "Example",
    "ImageInputError",
    "ImageMaps",
    "Maps",
    "attention_map",
    "plot_attention",
    "plot_before_after",
    "plot_discovery",
    "plot_norm_histograms",
    "plot_norm_maps",
    "plot_pca",
    "plot_registers",
    "principal_colours",
    "read_examples",
    "read_maps",
    "write_page",
    "write_task_page",
]
