"""Images from wherever they are: single files, batches for a tower, labelled data sets."""

from .augmentation import AUGMENTATIONS, Augmentation
from .batches import ImageBatches, list_images
from .datasets import Data, DataArguments, ProcessedDataset, load_data
from .folders import read_captioned_folder, read_flat_folder, read_image_folder
from .images import ImageFileError, check_image, load_image
from .processors import load_image_processor
from .stream_loading import load_stream
from .streaming import StreamedDataset

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Data",
    "DataArguments",
    "ImageBatches",
    "ImageFileError",
    "ProcessedDataset",
    "StreamedDataset",
    "check_image",
    "list_images",
    "load_data",
    "load_image",
    "load_image_processor",
    "load_stream",
    "read_captioned_folder",
    "read_flat_folder",
    "read_image_folder",
]
