"""Tiny models with two towers, on disk with a tokenizer, and pairs of images and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from register_adapter.testbed import COLOURS, LABELS, SHAPES, SceneDataset

_WORDS = ("a", "an", "photo", "of", "the", *COLOURS, *SHAPES)
_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SHAPE, "image_size": 32, "patch_size": 8}
_TEXT = {**_SHAPE, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
KINDS = ("clip", "siglip")


def make_tokenizer() -> Any:
    words = {word: index for index, word in enumerate(dict.fromkeys(("<s>", "</s>", "<unk>", *_WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_pair(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "clip":
        return tf.CLIPModel(tf.CLIPConfig(vision_config=_VISION, text_config=_TEXT, projection_dim=16)).eval()
    text = {**_TEXT, "projection_size": 32}
    model = tf.SiglipModel(tf.SiglipConfig(vision_config=_VISION, text_config=text)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model


def write_pair(folder: Path, kind: str) -> Path:
    make_pair(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_captions(folder: Path, count: int = 16, column: str = "text", seed: int = 5) -> Path:
    """Scenes with the names of what is in them, one or two texts each, as ``datasets`` reads them from a folder."""
    folder.mkdir(parents=True)
    scenes, lines = SceneDataset(count, seed=seed), []
    for index in range(count):
        scene = scenes.scene(index)
        scene.pil.save(folder / f"{index}.png")
        words = " ".join(LABELS[part.label] for part in scene.objects[:2])
        lines.append(json.dumps({"file_name": f"{index}.png", column: f"a photo of {words}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_pairs(folder: Path, *count: int) -> Path:
    """A model of each kind, by its name, and captioned images in ``images``."""
    for kind in KINDS:
        write_pair(folder / kind, kind)
    write_captions(folder / "images", *count)
    return folder
