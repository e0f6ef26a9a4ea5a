"""What the tables of tiny models share: sizes, text and vision configs, and the row itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers as tf

IMAGE, PATCH, WIDTH, BLOCKS, HEADS, LABELS = 32, 8, 32, 2, 4, 5
PATCHES = (IMAGE // PATCH) ** 2
IMAGE_TOKEN = 63

SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
MLP: dict[str, Any] = {"intermediate_size": 2 * WIDTH}
#: For configs that want the size of an image as a pair.
PAIR: dict[str, Any] = {**SHAPE, "image_size": [IMAGE, IMAGE]}
#: Four blocks, for heads that read four of them.
DEEP: dict[str, Any] = {**SHAPE, "num_hidden_layers": 4}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    """A model to test.

    Attributes:
        family: Family in the package's table.
        make: Builds the model with random weights.
        inputs: Names of the inputs beside the pixels.
        output: Name of the output that a loss is taken of.
        whole: Whether the model is a vision model of ``BLOCKS`` blocks (its outputs have their hidden states), not one
            part of a larger model.
        pixels: Kind of image that goes in; see ``families.PIXELS``.
        patches: Number of tokens behind the registers.
        images: Number of images in one item of the batch.
        image_tokens: Number of placeholders for the image in the text of a model with ``"image_text"``.
        no_gradient: Why no gradient comes to the tower, if none does.
        needs: The class of transformers, which an old version may not have.
    """

    family: str
    make: Callable[[], Any]
    inputs: tuple[str, ...] = ()
    output: str = "last_hidden_state"
    whole: bool = True
    pixels: str = "image"
    patches: int = PATCHES
    images: int = 1
    image_tokens: int = PATCHES
    no_gradient: str = ""
    needs: str = "ViTModel"


def case(family: str, kind: str, config: Callable[[], Any], **options: Any) -> Case:
    """A model of class ``kind``, made of what ``config()`` returns."""
    return Case(family, lambda: getattr(tf, kind)(config()), needs=kind, **options)


def configure(kind: str, **values: Any) -> Any:
    """A config of class ``kind``, looked up when it is made: an old version may not have it."""
    return getattr(tf, kind)(**values)


def llama() -> Any:
    """The text model of most vision-language models here."""
    return tf.LlamaConfig(**TEXT, num_key_value_heads=HEADS)
