"""Features that are NaN or infinite are refused by one sentence wherever they are read; no score is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from register_adapter import RegisterAdapterError, add_registers, attention_map, get_features
from register_adapter.evaluation import (
    analyse_registers,
    evaluate_depth,
    evaluate_knn,
    evaluate_linear,
    evaluate_segmentation,
    evaluate_zero_shot,
)
from register_adapter.evaluation.downstream import DenseImage, vote
from register_adapter.evaluation.measure import measure_model
from register_adapter.viz import read_maps

SIZE = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "intermediate_size": 8}
SIZE |= {"num_hidden_layers": 2, "num_attention_heads": 1}
RNG = np.random.default_rng(0)
IMAGES = [Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(8)]
PIXELS = torch.randn(2, 3, 16, 16)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float() / 255


def base(value: float = torch.nan) -> tf.ViTModel:
    """Broken in the second block."""
    torch.manual_seed(0)
    model = tf.ViTModel(tf.ViTConfig(**SIZE)).eval()
    with torch.no_grad():
        next(
            weight
            for name, weight in model.named_parameters()
            if any(part in name for part in ("1.mlp", "1.intermediate")) and weight.ndim == 2
        )[0, 0] = value
    return model


def adapter() -> Any:
    """A whole base, and registers that are NaN."""
    torch.manual_seed(0)
    model = add_registers(tf.ViTModel(tf.ViTConfig(**SIZE)).eval(), 2)
    model.base_model.model.registers.tokens("default").weight.data.fill_(torch.nan)
    return model


OPTIONS = {"image_processor": pixels, "num_workers": 1}
LABELLED = [{"image": image, "label": number % 2} for number, image in enumerate(IMAGES)]
MASKS = [DenseImage(image, np.arange(256).reshape(16, 16) // 128, f"{number}") for number, image in enumerate(IMAGES)]
DEPTHS = [DenseImage(image, RNG.random((16, 16)).astype(np.float32) + 1, f"{n}") for n, image in enumerate(IMAGES)]
PROCESSOR = {"image_processor": tf.ViTImageProcessor(size={"height": 16, "width": 16}), "num_workers": 1}

READERS: dict[str, Callable[[Any], Any]] = {
    "knn": lambda model: evaluate_knn({"m": model}, LABELLED[:5], LABELLED[5:], k=(1,), **OPTIONS),
    "linear": lambda model: evaluate_linear({"m": model}, LABELLED[:5], LABELLED[5:], **OPTIONS),
    "segmentation": lambda model: evaluate_segmentation({"m": model}, MASKS[:5], MASKS[5:], **PROCESSOR),
    "depth, bins": lambda model: evaluate_depth({"m": model}, DEPTHS[:5], DEPTHS[5:], **PROCESSOR),
    "depth, ridge": lambda model: evaluate_depth({"m": model}, DEPTHS[:5], DEPTHS[5:], head="ridge", **PROCESSOR),
    "features": lambda model: get_features(model, PIXELS, what=["patch", "cls"]),
    "keys": lambda model: get_features(model, PIXELS, layer=2, what="keys"),
    "measured": lambda model: measure_model("m", model, [PIXELS]),
    "attention map": lambda model: attention_map(model, PIXELS[0]),
    "maps": lambda model: read_maps("m", model, PIXELS),
}
WHOLE = "not finite (NaN or infinite) for "


@pytest.mark.parametrize("reader", READERS)
def test_a_broken_adapter_is_named_with_the_layer_and_the_images(reader: str) -> None:
    model = adapter()
    with pytest.raises(RegisterAdapterError) as said:
        READERS[reader](model)
    message = str(said.value)
    assert "ViTModel with the adapter 'default' at layer " in message
    assert WHOLE in message
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("reader", [name for name in READERS if name != "keys"])  # the second block's keys are whole
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_base_is_named(reader: str, value: float) -> None:
    with pytest.raises(RegisterAdapterError, match=r"of ViTModel at layer \d are not finite \(NaN or infinite\) for"):
        READERS[reader](base(value))


def test_the_base_of_a_broken_adapter_is_read() -> None:
    model = adapter()
    assert get_features((model, None), PIXELS)["patch"].isfinite().all()
    assert evaluate_knn({"base": (model, None)}, LABELLED[:5], LABELLED[5:], k=(1,), **OPTIONS).rows
    with pytest.raises(RegisterAdapterError, match=r"the patch tokens of ViTModel with the adapter 'default'"):
        evaluate_knn({"a": (model, None), "b": (model, "default")}, LABELLED[:5], LABELLED[5:], k=(1,), **OPTIONS)


def test_only_broken_images_count() -> None:
    model = base(value=0.0)
    images = PIXELS.clone()
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(RegisterAdapterError, match=r"at layer 2 are .* for 1 of 2 images"):
        get_features(model, images)


def test_registers_are_not_analysed() -> None:
    with pytest.raises(RegisterAdapterError, match="ViTModel with the adapter 'default' at layer 0 are not finite"):
        analyse_registers(adapter(), IMAGES, **OPTIONS)
    with pytest.raises(RegisterAdapterError, match="ViTModel with the adapter 'default' at layer 2 are not finite"):
        analyse_registers(add_registers(base(), 2), IMAGES, **OPTIONS)


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_no_class_is_chosen_by_broken_embeddings(tower: str) -> None:
    text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=SIZE, projection_dim=8)).eval()
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if f"{tower}." in name and "fc2" in name).fill_(
            torch.nan
        )
    tokens = torch.zeros(2, 3, dtype=torch.long)
    rows = "2 of 2 texts" if tower == "text_model" else "8 of 8 images"
    with pytest.raises(RegisterAdapterError, match=rf"embeddings of CLIPModel are not finite .* {rows}"):
        evaluate_zero_shot(
            {"m": model}, LABELLED, templates=["{}"], tokenizer=lambda texts: {"input_ids": tokens}, **OPTIONS
        )


@pytest.mark.parametrize("broken", ["train", "queries"])
def test_nothing_votes_for_what_is_not_finite(broken: str) -> None:
    features = {"train": torch.ones(4, 3), "queries": torch.ones(2, 3)}
    features[broken][1, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{broken} has NaN or infinity in 1 of"):
        vote(features["train"], [0, 1, 0, 1], features["queries"], k=(1,))
