"""Arguments of another kind than a public function takes are named, with what was found, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import build

from register_adapter import (
    RegisterConfig,
    add_registers,
    attention_map,
    audit,
    compose,
    export_native,
    fit_test_time_registers,
    get_features,
)
from register_adapter.evaluation import evaluate_knn, evaluate_segmentation
from register_adapter.evaluation.discovery import discover
from register_adapter.studies import study
from register_adapter.viz import read_examples

PIXELS = torch.zeros(3, 3, 32, 32)


def features(**options: Any) -> Any:
    return get_features(build("vit"), PIXELS, **options)


def fit(**options: Any) -> Any:
    return fit_test_time_registers(build("vit"), PIXELS, **options)


def shown(**options: Any) -> Any:
    return attention_map(build("vit"), PIXELS[0], **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: features(layer="1"), "layer must be a whole number, got '1' of type str"),
        (lambda: features(layer=None), "layer must be a whole number, got None"),
        (lambda: features(batch_size=2.5), "batch_size must be a whole number, got 2.5 of type float"),
        (lambda: features(max_images="3"), "max_images must be a whole number"),
        (lambda: features(num_workers=None), "num_workers must be a whole number"),
        (lambda: features(what=None), "what=None, expected one or some of patch"),
        (lambda: features(dtype=torch.int8), "dtype must be a floating point dtype .* got torch.int8"),
        (lambda: features(dtype="float16"), "dtype must be a floating point dtype .* got 'float16'"),
        (lambda: audit(build("vit"), PIXELS, rule=None), "rule must be a name .*auto.* got None"),
        (lambda: audit(build("vit"), PIXELS, batch_size="8"), "batch_size must be a whole number"),
        (lambda: fit(num_neurons="4"), "num_neurons must be a whole number"),
        (lambda: fit(top_block=1.0), "top_block must be a whole number"),
        (lambda: fit(top_block=1, threshold="9"), "threshold must be a number, got '9' of type str"),
        (lambda: fit(image_sizes=32), "image_sizes must be one or more sizes"),
        (lambda: fit(image_sizes=["32"]), "a size of image_sizes must be a whole number"),
        (lambda: shown(block="last"), "block must be a whole number"),
        (lambda: discover(build("vit"), [PIXELS[0]], block=None), "block must be a whole number"),
        (lambda: study(build("vit"), "photos", "study", seeds="3"), "seeds must be a whole number"),
        (lambda: compose(build("vit"), [RegisterConfig()]), "configs must be a dictionary of PEFT configs"),
        (lambda: export_native(add_registers(build("dinov2"), 1), image_size=(28, 28)), "image_size must be a whole"),
    ],
)
def test_what_is_no_number_name_or_dictionary_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("data", ["photos", None, [("a.png",)], [{"image": 1}]], ids=["name", "none", "single", "item"])
def test_sets_of_dense_tasks_that_are_no_pairs_are_named(data: Any) -> None:
    with pytest.raises(ValueError, match="train must be pairs of an image and its target, found"):
        evaluate_segmentation(build("vit"), data, data)


@pytest.mark.parametrize("k", [5, "5", ["5"], [0], []])
def test_what_is_no_number_of_neighbours_is_named(k: Any) -> None:
    with pytest.raises(ValueError, match="k must be numbers of neighbours, at least 1"):
        evaluate_knn(build("vit"), "train", "test", k=k)


@pytest.mark.parametrize("size", [0, -3, 2.5, "32", (32,), (1, 2, 3), 10**6, (10**6, 1000)])
def test_a_size_that_is_none_or_too_large_is_refused_before_the_image_is_resized(size: Any) -> None:
    for call in (lambda: shown(size=size), lambda: read_examples(build("vit"), [PIXELS[0]], size=size)):
        with pytest.raises(ValueError, match=r"size must be pixels|size=.* (must be at least 1|is too large)"):
            call()


def test_a_negative_size_of_an_export_is_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="image_size=-14 is smaller than one patch"):
        export_native(add_registers(build("dinov2"), 1), image_size=-14)


def test_numbers_of_numpy_are_numbers() -> None:
    assert len(features(layer=np.int64(1), batch_size=np.int32(2), max_images=np.int64(2))) == 2
