"""A tiny model on disk, an image folder of real photographs, and the command line in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit

ROOT = Path(__file__).parent.parent


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_vit(folder: Path, labels: list[str], dropout: float = 0.1, std: float = 0.02) -> Path:
    """A random ViT (2 blocks of width 32, 32 px, patch 8) with its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        initializer_range=std,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_planted(folder: Path, count: int, seed: int = 3, places: Sequence[str] = ("",)) -> Path:
    """The planted model with its processor in ``model``, and scenes in ``images``, dealt to folders there in turn."""
    load_planted_vit().model.save_pretrained(folder / "model")
    load_image_processor().save_pretrained(folder / "model")
    scenes = SceneDataset(count, seed=seed)
    for index in range(count):
        place = folder / "images" / places[index % len(places)]
        place.mkdir(parents=True, exist_ok=True)
        scenes.scene(index).pil.save(place / f"{index}.png")
    return folder


def write_photographs(folder: Path, *options: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["real_photographs.py", str(folder), *options])
        load_example("real_photographs").main()
    return folder


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()
