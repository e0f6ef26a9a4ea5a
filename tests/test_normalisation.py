"""By which mean and standard deviation images are normalised, whoever's image processor it is."""

from __future__ import annotations

from typing import Any

import pytest
import timm.data
import transformers as tf
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from register_adapter.data.processors import normalisation_of
from register_adapter.training.objectives.distillation import _white_of

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
_TIMM = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}


@pytest.mark.parametrize(
    "processor",
    [
        tf.ViTImageProcessor(image_mean=MEAN, image_std=STD),
        TimmWrapperImageProcessor({**_TIMM, "architecture": "vit_tiny_patch16_224"}),
        timm.data.create_transform(**_TIMM, is_training=False),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_it_is_known_of_every_kind_of_processor(processor: Any) -> None:
    mean, std = normalisation_of(processor) or ([], [])
    assert mean == pytest.approx(MEAN)
    assert std == pytest.approx(STD)
    # Views of the distillation are padded with what white becomes.
    assert _white_of(processor) == pytest.approx([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])


def test_it_is_not_made_up() -> None:
    unknown = tf.ViTImageProcessor(do_normalize=False)
    assert normalisation_of(unknown) is None
    assert _white_of(unknown) == [1.0, 1.0, 1.0]
