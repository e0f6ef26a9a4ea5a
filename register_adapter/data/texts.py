"""Texts for models with a text tower: tokenizers, captions of items, and prompts from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from ..utils.files import check_regular, parse_json, read_text
from ..utils.hub import access_error
from ..utils.models import require_model
from ..utils.shipped import local_folder
from .processors import source_of

__all__ = ["TextTokenizer", "caption_of", "check_tokens", "load_tokenizer", "read_prompts"]


class TextTokenizer:
    """Turns texts into what a text tower takes, all of one length.

    Args:
        tokenizer: A tokenizer of transformers.
        length: Tokens in every text; longer ones are cut, shorter ones padded.
        words: How many tokens the text tower knows; ``None`` does not check.
    """

    def __init__(self, tokenizer: Any, length: int, words: int | None = None) -> None:
        self.tokenizer, self.length, self.words = tokenizer, length, words

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> TextTokenizer:
        """The tokenizer of a model with a text tower.

        Args:
            model: The model.
            name: Folder or name of the tokenizer; ``None``: from where the model was loaded.

        Raises:
            ValueError: The model does not say where that is, or there is none.
        """
        config: Any = model.config
        source = name or source_of(model)
        if not source:
            raise ValueError(
                f"{type(model).__name__} does not say where it was loaded from, so its tokenizer cannot be looked up: "
                "give tokenizer="
            )
        revision = None if name else getattr(config, "_commit_hash", None)
        tokenizer = load_tokenizer(source, **({"revision": revision} if revision else {}))
        most = getattr(config.text_config, "max_position_embeddings", None)
        words = getattr(config.text_config, "vocab_size", None)
        return cls(tokenizer, min(tokenizer.model_max_length, most or 77), words)

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """``input_ids`` ``(B, length)``, and ``attention_mask`` where the tokenizer's model wants one.

        Raises:
            ValueError: The text tower does not know a token: the tokenizer is another model's.
        """
        made = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        if self.words is not None:
            check_tokens(made["input_ids"], self.words)
        return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}


def check_tokens(ids: torch.Tensor, words: int) -> None:
    """Refuse numbers of tokens that a text tower with ``words`` of them does not know.

    Raises:
        ValueError: There is one: the tokenizer is another model's.
    """
    largest = int(ids.max())
    if largest >= words:
        raise ValueError(
            f"the tokenizer is another model's: it has a token {largest}, and the text tower knows {words}"
        )


def load_tokenizer(name_or_path: str, **kwargs: Any) -> Any:
    """The tokenizer of a model; ``kwargs`` go to ``AutoTokenizer.from_pretrained``.

    Raises:
        HubAccessError: There is no model of that name at all, or the Hub cannot be reached.
        ValueError: The folder or repository holds no tokenizer.
        OSError: A pipe, a socket or a device is in the folder.
    """
    folder = local_folder(name_or_path)
    check_regular(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes an empty one up
            raise ValueError("there is no vocabulary")
        return tokenizer
    except Exception as error:  # of the HTTP library too
        if (refused := access_error(name_or_path, error, kwargs.get("token"))) is not None:
            raise refused from refused.__cause__
        require_model(name_or_path, **kwargs)
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"no tokenizer could be read in {name_or_path!r}: save the model's own there "
            f"({type(error).__name__}: {said})"
        ) from error


def caption_of(item: dict[str, Any]) -> str:
    """The text of an item; the first where it has several.

    Raises:
        ValueError: There is none.
    """
    given = item.get("text")
    text = given[0] if isinstance(given, list | tuple) and given else given
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"item {item.get('index', '')} has no text (found {given!r:.60})".replace("  ", " "))
    return text


def read_prompts(path: str | Path) -> list[list[str]]:
    """Prompts from a file, the classes one after another, each with its texts.

    Args:
        path: A text file with a prompt a line; or JSON: a list of prompts, or a mapping from each class to its prompt
            or to a list of prompts.

    Raises:
        ValueError: It holds fewer than two classes, or something else.
        OSError: It cannot be read.
    """
    text = read_text(path)
    if Path(path).suffix.lower() != ".json":
        classes: Any = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            classes = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    listed = list(classes.values()) if isinstance(classes, dict) else classes
    prompts = [[entry] if isinstance(entry, str) else entry for entry in listed] if isinstance(listed, list) else None
    if prompts is None or not all(_are_texts(group) for group in prompts):
        raise ValueError(
            f"{path} must be a list of prompts, or a mapping from classes to prompts, such as "
            '{"cat": ["a photo of a cat", "a cat"]}'
        )
    if len(prompts) < 2:
        raise ValueError(f"{path} must hold prompts for at least two classes, found {len(prompts)}")
    return prompts


def _are_texts(group: Any) -> bool:
    return isinstance(group, list) and bool(group) and all(isinstance(text, str) and text.strip() for text in group)
