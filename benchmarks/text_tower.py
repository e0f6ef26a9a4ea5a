"""A text tower for the shipped ViT, so that zero-shot classification has something to measure on the test bed.

The image tower is locked and a small BERT learns to say of a scene what the clean ViT's CLS token says: locked-image
tuning (LiT, arXiv 2111.07991), with CLIP's symmetric loss (arXiv 2103.00020). Captions name a scene's object. Six of
the 30 pairs of colour and shape are in no caption, though their images belong to the classes that are asked for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F

from register_adapter.testbed import COLOURS, LABELS, SHAPES

__all__ = ["UNNAMED", "TextTower"]

#: Classes that no caption names: each colour and each shape is in others.
UNNAMED = tuple(f"{colour} {shape}" for colour, shape in zip((*COLOURS, *COLOURS), SHAPES, strict=False))
_CAPTIONS = ("a photo of a {}", "a {}", "the {}", "a bad photo of the {}", "a photo of the large {}")
#: Words of the captions, of CLIP's templates, and of the names.
_WORDS = ("a", "the", "of", "photo", "bad", "large", "small", "art", "itap", "origami", "in", "video", "game", ".")
_STEPS, _BATCH, _RATE, _TOKENS = 300, 128, 1e-3, 12


def _make_tokenizer() -> Any:
    words = dict.fromkeys(("<s>", "</s>", "<pad>", "<unk>", *_WORDS, *COLOURS, *SHAPES))
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<s>", numbers["<s>"]), ("</s>", numbers["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class _Cls(nn.Module):
    """A pooler that gives the CLS token as it is."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[:, 0]


class TextTower:
    """Learns the captions of images from what the clean ViT says of them.

    Args:
        twin: The clean ViT, with its classification head.
        pixels: ``(N, 3, H, W)``, images that the tower learns from.
        labels: ``(N,)``, their classes, out of the test bed's.
        seed: Of the tower's weights, and of the order of images and captions.
    """

    def __init__(self, twin: Any, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
        self._tokenizer = _make_tokenizer()
        torch.manual_seed(seed)
        config = tf.BertConfig(
            vocab_size=len(self._tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=_TOKENS,
        )
        self._text, self._projection = tf.BertModel(config), nn.Linear(64, twin.config.hidden_size, bias=False)
        self._scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._learn(twin, pixels, labels, torch.Generator().manual_seed(seed))

    def beside(self, model: Any) -> Any:
        """A model with two towers; that for images is a copy of ``model``'s, its registers included."""
        base = copy.deepcopy(model.get_base_model() if hasattr(model, "get_base_model") else model)
        base.vit.pooler = _Cls()
        made = tf.ViTModel(base.config, add_pooling_layer=False)
        pair = tf.VisionTextDualEncoderModel(vision_model=made, text_model=copy.deepcopy(self._text))
        pair.vision_model = base.vit  # not in the line before, which draws the values of LoRA's layers anew
        pair.visual_projection = nn.Identity()  # the image tower is locked, and so is what it embeds
        pair.text_projection, pair.logit_scale = self._projection, self._scale
        return pair.eval()

    def tokenize(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Texts as the text tower takes them, ``(B, 12)`` each."""
        return dict(
            self._tokenizer(list(texts), padding="max_length", max_length=_TOKENS, truncation=True, return_tensors="pt")
        )

    def _learn(self, twin: Any, pixels: torch.Tensor, labels: torch.Tensor, order: torch.Generator) -> None:
        """CLIP's loss between images and captions; images of one class are all of them right."""
        named = torch.tensor([LABELS[label] not in UNNAMED for label in labels.tolist()])
        with torch.no_grad():
            seen = [twin.vit(pixel_values=some).last_hidden_state[:, 0] for some in torch.split(pixels[named], 64)]
        images, labels = F.normalize(torch.cat(seen), dim=-1), labels[named]
        moved = [*self._text.parameters(), *self._projection.parameters(), self._scale]
        optimizer = torch.optim.AdamW(moved, _RATE)
        self._text.train()
        for _ in range(_STEPS):
            batch = torch.randint(len(labels), (_BATCH,), generator=order)
            said = torch.randint(len(_CAPTIONS), (_BATCH,), generator=order).tolist()
            captions = [
                _CAPTIONS[which].format(LABELS[label])
                for which, label in zip(said, labels[batch].tolist(), strict=True)
            ]
            texts = self._projection(self._text(**self.tokenize(captions)).pooler_output)
            logits = self._scale.exp() * images[batch] @ F.normalize(texts, dim=-1).T
            right = (labels[batch][:, None] == labels[batch]).float()
            right /= right.sum(1, keepdim=True)
            loss = F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        self._text.eval().requires_grad_(False)
