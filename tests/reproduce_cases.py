"""Tiny models of the classes that ``docs/reproduce.md`` names, data in the same layouts, its commands made small."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
import transformers as tf
from pairs import make_tokenizer
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from register_adapter.evaluation import evaluate_depth, evaluate_linear, evaluate_segmentation
from register_adapter.evaluation.discovery import Sweep
from register_adapter.testbed import SceneDataset, plant_artifacts
from register_adapter.testbed.scenes import Scene

DOCUMENT = Path(__file__).parents[1] / "docs" / "reproduce.md"
#: Images are wider than high, and larger than what the models take.
WIDTH, HEIGHT = 64, 56
BLOCKS, PATCH, SIDE = 2, 8, 32
_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
_VISION = {**_SHAPE, "num_hidden_layers": BLOCKS, "image_size": SIDE, "patch_size": PATCH}
_TEXT = {**_SHAPE, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 16}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}

# What stands in for what the document says: models, numbers behind a flag, and flags that make a command short.

MODELS = {
    "facebook/dinov2-large": "models/dinov2",
    "laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "models/clip",
    "hf-hub:laion/CLIP-ViT-B-16-laion2B-s34B-b88K": "local-dir:models/open_clip",
    "timm/deit3_base_patch16_224.fb_in22k_ft_in1k": "models/deit3",
    "google/siglip2-base-patch16-224": "models/siglip2",
}
SMALLER = {
    "--size": {"518": "70", "224": "32", "224x224": "32x32"},
    "--image-sizes": {"518": "70", "224": "56"},
    "--k": {"20": "3"},
    "--num-views": {"10": "2"},
    "--num-train-epochs": {"100": "1", "2": "1"},
    "--per-device-train-batch-size": {"8": "8", "16": "8"},
    "--train-val-split": {"0.02": "0.2", "0.05": "0.2"},
    "--dataloader-num-workers": {"8": "0"},
}
SHORT = {
    "train": ("--max-train-steps", "1", "--use-cpu"),
    "discovery": ("--max-images", "5", "--device", "cpu"),
    "": ("--device", "cpu"),
}
#: What is tried on held-out images.
SWEEP = Sweep(("keys", "tokens"), 1, {"lost": [{"normalize": True, "bias": -0.1}]})
#: Tasks that try one penalty in place of many, in few steps.
QUICK = {
    "linear": partial(evaluate_linear, inverse_penalties=(1.0,), max_iter=6),
    "segmentation": partial(evaluate_segmentation, inverse_penalties=(1.0,), max_iter=6),
    "depth": partial(evaluate_depth, penalties=(0.01,), max_iter=2),
}


def commands() -> list[list[str]]:
    """The words of the document's commands, without the program's name, in its order."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```$", DOCUMENT.read_text("utf-8"))
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip()]


def python_blocks() -> list[str]:
    """The document's Python, with the models and sizes of the test."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", DOCUMENT.read_text("utf-8"))
    small = {"facebook/dinov2-large": MODELS["facebook/dinov2-large"], ": 518": ": 70"}
    return [reduce(lambda code, pair: code.replace(*pair), small.items(), block) for block in blocks]


def made_small(words: list[str]) -> list[str]:
    """A command of the document on the models of :func:`write_models`, in a few steps."""
    flags = ["", *words[:-1]]
    small = [MODELS.get(word, SMALLER.get(flag, {}).get(word, word)) for flag, word in zip(flags, words, strict=True)]
    (more,) = [SHORT[word] for word in words[:2] if word in SHORT] or [SHORT[""]]
    return [*small, *more, "--quiet"]


# Models


def _scenes(count: int, size: int, seed: int) -> torch.Tensor:
    scenes = SceneDataset(count, size=size, seed=seed, split=None)
    pixels = torch.stack([torch.from_numpy(scenes.scene(number).image) for number in range(count)])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _planted(model: nn.Module, size: int = SIDE) -> Any:
    """With outliers, which the refinement and the fit ask for."""
    return plant_artifacts(model.eval(), 0, _scenes(64, size, 0), share=0.08, attraction_steps=0).model


def _processor(size: int = SIDE, **options: Any) -> Any:
    return tf.ViTImageProcessor(size={"height": size, "width": size}, **options)


def write_models(folder: Path) -> None:
    """One model of each class, with its processor and tokenizer, in the layout of its library's hub."""
    torch.manual_seed(0)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    dinov2 = tf.Dinov2Config(**_VISION | {"image_size": 56, "patch_size": 14}, mlp_ratio=2)
    _planted(tf.Dinov2Model(dinov2), 56).save_pretrained(folder / "dinov2")
    crop = {"height": 56, "width": 56}
    tf.BitImageProcessor(size={"shortest_edge": 56}, crop_size=crop, **half).save_pretrained(folder / "dinov2")

    text = {**_TEXT, **_TOKENS}
    clip = tf.CLIPModel(tf.CLIPConfig(vision_config=_VISION, text_config=text, projection_dim=16))
    siglip = tf.SiglipModel(tf.SiglipConfig(vision_config=_VISION, text_config={**text, "projection_size": 32}))
    for name, model in (("clip", clip), ("siglip2", siglip)):
        _planted(model).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        _processor(**half).save_pretrained(folder / name)

    shape = {"depth": BLOCKS, "embed_dim": 32, "num_heads": 2, "img_size": SIDE, "patch_size": PATCH, "mlp_ratio": 2}
    deit3 = timm.create_model("deit3_base_patch16_224", num_classes=4, **shape)
    deit3.pretrained_cfg |= {"input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 4}
    save_for_hf(_planted(deit3), folder / "deit3", safe_serialization=True)
    config = json.loads((folder / "deit3" / "config.json").read_text())
    (folder / "deit3" / "config.json").write_text(json.dumps({**config, "model_args": shape}))

    vision = {"layers": BLOCKS, "width": 32, "head_width": 16, "patch_size": PATCH, "image_size": SIDE}
    words = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    native = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**words))
    weights = {key: value.contiguous() for key, value in _planted(native).state_dict().items()}
    (folder / "open_clip").mkdir()
    save_file(weights, folder / "open_clip" / "open_clip_model.safetensors")
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": words}
    said = json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    (folder / "open_clip" / "open_clip_config.json").write_text(said)


# Data


def _save(array: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST).save(path)


def _draw(count: int, seed: int) -> list[Scene]:
    scenes = SceneDataset(count, size=HEIGHT, seed=seed, split=None)
    return [scenes.scene(number) for number in range(count)]


_XML = (
    "<annotation><object><name>x</name><difficult>0</difficult><truncated>0</truncated><bndbox><xmin>{}</xmin>"
    "<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>"
)


def _write_voc(root: Path, scenes: list[Scene]) -> None:
    for folder in ("Annotations", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = [f"2007_{number:06}" for number in range(len(scenes))]
    for name, scene in zip(names, scenes, strict=True):
        _save(scene.pil, root / "JPEGImages" / f"{name}.jpg")
        _save(scene.mask.astype(np.uint8), root / "SegmentationClass" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(_XML.format(*map(int, scene.objects[0].box)))
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names))
    for split, part in (("train", names[:6]), ("val", names[6:])):
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(part))


def _write_coco(root: Path, scenes: list[Scene]) -> None:
    """As it is downloaded: one image more than the list of the authors of LOST has."""
    images, boxes = [], []
    for number, scene in enumerate(scenes):
        name = f"COCO_train2014_{number:012}.jpg"
        _save(scene.pil, root / "train2014" / name)
        images.append({"id": number, "file_name": name})
        x0, y0, x1, y1 = map(float, scene.objects[0].box)
        boxes.append({"id": number, "image_id": number, "iscrowd": 0, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train2014.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    listed = "\n".join(f"train2014/{image['file_name']}" for image in images[1:])
    (root / "coco_20k_filenames.txt").write_text(listed)


def write_data(root: Path) -> None:
    """The data sets of the document, drawn: a dozen images each."""
    for number, scene in enumerate(_draw(16, 1)):
        _save(scene.pil, root / "images" / f"{number}.jpg")
        _save(scene.pil, root / "flickr30k" / "images" / f"{number}.jpg")
    for part, count, seed in (("train", 16, 2), ("val", 6, 3)):
        for number, scene in enumerate(_draw(count, seed)):
            _save(scene.pil, root / "imagenet" / part / ("n01", "n02")[number % 2] / f"{part}{number}.JPEG")
    for name, kinds in (("names", ("red circle", ["blue star", "star"])), ("names-lower", ("red circle", "blue star"))):
        (root / "imagenet" / f"{name}.json").write_text(json.dumps(dict(zip(("n01", "n02"), kinds, strict=True))))
    (root / "imagenet" / "templates-lower.txt").write_text("a photo of a {}\nthe {}\n")
    ade = root / "ADEChallengeData2016"
    for part, count, seed in (("training", 6, 4), ("validation", 3, 5)):
        for number, scene in enumerate(_draw(count, seed)):
            _save(scene.pil, ade / "images" / part / f"{number}.jpg")
            _save(scene.mask.astype(np.uint8) + 1, ade / "annotations" / part / f"{number}.png")
    for part, count, seed in (("train", 6, 6), ("test", 3, 7)):
        for number, scene in enumerate(_draw(count, seed)):
            depth = 1000 + 50 * scene.mask.astype(np.uint16)
            _save(scene.pil, root / "nyu" / part / "kitchen" / f"rgb_{number:05}.jpg")
            _save(depth.astype(np.uint16), root / "nyu" / part / "kitchen" / f"sync_depth_{number:05}.png")
    for year, seed in (("VOC2007", 8), ("VOC2012", 9)):
        _write_voc(root / "VOCdevkit" / year, _draw(10, seed))
    _write_coco(root / "coco", _draw(11, 10))
