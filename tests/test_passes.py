"""One pass over images: its options, its consumers, labels where some images are bad, and which outputs are logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases_base import LABELS
from families import build, make_inputs

from register_adapter import add_registers
from register_adapter.artifacts import RULES, Statistics
from register_adapter.artifacts.auditing import build_report
from register_adapter.artifacts.detector.features import AttentionFeatures
from register_adapter.data import ImageFileError
from register_adapter.evaluation.probes.samples import TokenSampler
from register_adapter.features.passes import PassOptions, open_pass, run_whole
from register_adapter.testbed import SceneDataset, load_image_processor, load_vit

BATCH = 3


def _stack(name: str, **changes: Any) -> Any:
    from stacks_cases import build_stack

    model = build_stack(name)
    for attribute, value in changes.items():
        getattr(model, attribute)(value)
    return model.eval()


#: A model, and the number of classes it tells apart; 0 for one whose output is an embedding.
OUTPUTS: dict[str, tuple[Any, int]] = {
    "vit-classifier": (lambda: build("vit-classifier"), LABELS),
    "vit": (lambda: build("vit"), 0),
    "clip": (lambda: build("clip"), 0),
    "clip-projection": (lambda: build("clip-projection"), 0),
    "timm": (lambda: _stack("timm"), LABELS),
    "timm-embedding": (lambda: _stack("timm", reset_classifier=0), 0),
    "eva-embedding": (lambda: _stack("eva", reset_classifier=0), 0),
    "open_clip": (lambda: _stack("open_clip"), 0),
    "open_clip-whole": (lambda: _stack("open_clip-whole"), 0),
    "torchvision": (lambda: _stack("torchvision"), LABELS),
    "hub": (lambda: _stack("hub"), 0),
}


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("name", OUTPUTS)
def test_only_logits_count_as_logits(name: str, registers: int) -> None:
    make, classes = OUTPUTS[name]
    model = make()
    model = add_registers(model, registers).eval() if registers else model
    pixels = make_inputs("vit", batch=BATCH)["pixel_values"]
    with torch.no_grad():
        logits = run_whole(model, pixels)
    assert (None if logits is None else tuple(logits.shape)) == ((BATCH, classes) if classes else None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in the order of their names; the fourth and the last are none."""
    scenes = SceneDataset(10, seed=8, split=None)
    for index in range(10):
        path = tmp_path / f"{index}.png"
        scenes[index]["image"].save(path)
        if index in (3, 9):
            path.write_bytes(path.read_bytes()[:60])
    return tmp_path


def test_labels_stay_with_their_images_where_others_are_bad(folder: Path) -> None:
    given = np.arange(10) * 11
    options = PassOptions(load_image_processor(), batch_size=4)
    batches = list(open_pass(load_vit(), folder, options, labels=given, with_labels=True))
    labels = np.concatenate([batch.labels for batch in batches])
    assert labels.tolist() == [0, 11, 22, 44, 55, 66, 77, 88]
    assert sum(batch.size for batch in batches) == 8
    alone = load_image_processor()([SceneDataset(10, seed=8, split=None)[4]["image"]], return_tensors="pt")
    place = labels.tolist().index(44)
    assert torch.equal(torch.cat([batch.inputs["pixel_values"] for batch in batches])[place], alone["pixel_values"][0])


def test_too_few_labels_are_refused(folder: Path) -> None:
    options = PassOptions(load_image_processor(), batch_size=4)
    with pytest.raises(ValueError, match="labels has 8 entries, and there are at least 9 images"):
        list(open_pass(load_vit(), folder, options, labels=range(8), with_labels=True))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_halves_are_the_whole(size: int) -> None:
    pixels = torch.arange(3.0 * size).reshape(size, 3)
    batches = [{"pixel_values": pixels, "labels": torch.arange(size), "size": torch.tensor(7)}]
    for batch in open_pass(load_vit(), batches, with_labels=True):
        halves = [batch.half(second) for second in (False, True)]
        assert [half.size for half in halves] == [size // 2, size - size // 2]
        assert torch.equal(torch.cat([half.inputs["pixel_values"] for half in halves]), pixels)
        assert np.concatenate([half.labels for half in halves]).tolist() == list(range(size))


# Options


def test_options_say_how_images_are_read(folder: Path) -> None:
    options = PassOptions(load_image_processor(), batch_size=3, max_images=7, dtype=torch.bfloat16)
    opened = open_pass(load_vit(), folder, options)
    batches = list(opened)
    assert [batch.size for batch in batches] == [3, 2, 1], "the fourth of the first seven is bad"
    assert {batch.inputs["pixel_values"].dtype for batch in batches} == {torch.bfloat16} == {opened.dtype}
    assert ["3.png" in line for line in opened.skipped] == [True]
    with pytest.raises(ImageFileError, match=r"3\.png"):
        list(open_pass(load_vit(), folder, PassOptions(load_image_processor(), strict=True)))
    assert open_pass(load_vit().bfloat16(), folder, PassOptions(load_image_processor())).dtype == torch.bfloat16


@pytest.mark.parametrize("option", ["batch_size", "max_images", "num_workers"])
def test_options_out_of_range_are_refused_before_anything_runs(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        open_pass(load_vit(), torch.rand(2, 3, 80, 80), PassOptions(**{option: 0}))


def test_a_bar_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = torch.rand(4, 3, 80, 80)
    list(open_pass(load_vit(), pixels, title="a title"))
    assert "a title" not in capsys.readouterr().err
    list(open_pass(load_vit(), pixels, PassOptions(progress=True), title="a title"))
    assert "a title: 100%" in capsys.readouterr().err


def test_labels_that_nobody_asks_for_are_not_looked_at() -> None:
    batches = [(torch.rand(2, 3, 80, 80), torch.tensor([0.5, 1.5]))]
    (batch,) = open_pass(load_vit(), batches)
    assert batch.labels is None
    with pytest.raises(ValueError, match="numbers of classes"):
        list(open_pass(load_vit(), batches, with_labels=True))


def test_a_second_loop_goes_on_where_the_first_one_stopped() -> None:
    pixels = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 80, 80)
    opened = open_pass(load_vit(), pixels, PassOptions(batch_size=2))
    assert next(iter(opened)).inputs[:, 0, 0, 0].tolist() == [0, 1]
    assert [batch.inputs[:, 0, 0, 0].tolist() for batch in opened] == [[2, 3], [4]]


# Consumers


def _consumers(model: Any, opened: Any) -> dict[str, tuple[Any, Any]]:
    """Of each kind one, and a function that gives what it has read."""
    statistics, features = Statistics(opened.tower), []
    sampler = TokenSampler(opened.tower, opened.registers, None, 2, True, 2, 5, 3)

    def summed() -> Any:
        values = build_report(statistics, RULES["auto"], "auto", "model").to_dict()
        return {key: values[key] for key in ("layers", "num_images", "grid", "verdict", "num_registers")}

    def drawn() -> Any:
        return [
            (item.image, item.prefix.tolist(), item.patches["normal"].tolist(), item.pixels["normal"].tolist())
            for item in sampler.samples().plain
        ]

    return {
        "statistics": (statistics, summed),
        "tokens": (sampler, drawn),
        "attention": (
            AttentionFeatures(model, features.append),
            lambda: [values.tolist() for values in features],
        ),
    }


def _eager() -> Any:
    """With fused attention, tokens read beside attention maps differ in the last digits from those read alone."""
    model = build("vit")
    model.set_attn_implementation("eager")
    return model


#: One for each way in which attention maps are recorded.
MODELS: dict[str, Any] = {
    "vit": _eager,
    "timm": lambda: _stack("timm"),
    "torchvision": lambda: _stack("torchvision"),
    "registers": lambda: add_registers(_eager(), 2).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_pass_feeds_several_consumers_and_each_gets_what_it_gets_alone(name: str) -> None:
    model, calls = MODELS[name](), []
    pixels = make_inputs("vit", batch=7)["pixel_values"]

    def opened() -> Any:
        return open_pass(model, pixels, PassOptions(batch_size=3))

    together = opened()
    consumers = _consumers(model, together)
    handle = together.tower.module.register_forward_hook(lambda *_: calls.append(1))
    together.run(*(consumer for consumer, _ in consumers.values()))
    handle.remove()
    assert len(calls) == 3, "the tower runs once for each batch"
    for kind, (_, read) in consumers.items():
        alone = opened()
        consumer, read_alone = _consumers(model, alone)[kind]
        alone.run(consumer)
        assert read_alone(), kind
        assert read() == read_alone(), kind


class _Broken:
    """A consumer that fails where it is told to, and has hooks that must be gone then."""

    def __init__(self, tower: Any, where: str) -> None:
        self.tower, self.where = tower, where

    @contextmanager
    def attach(self) -> Iterator[None]:
        handle = self.tower.part("blocks")[0].register_forward_hook(self._during)
        try:
            if self.where == "attach":
                raise RuntimeError("broken")
            yield
        finally:
            handle.remove()

    def _during(self, module: torch.nn.Module, *_: Any) -> None:
        assert not module.training
        assert not torch.is_grad_enabled()
        torch.rand(1)
        if self.where == "forward":
            raise RuntimeError("broken")

    def take(self, batch: Any) -> None:
        if self.where == "take":
            raise RuntimeError("broken")


@pytest.mark.parametrize("where", ["attach", "forward", "take", "images"])
def test_all_is_as_before_after_an_exception(where: str) -> None:
    model = load_vit().train()
    model.vit.embeddings.eval()
    modes = [part.training for part in model.modules()]
    state, implementation = torch.get_rng_state(), model.config._attn_implementation
    hooks = _hooks(model)
    images = [torch.rand(2, 3, 80, 80), "no batch"] if where == "images" else torch.rand(4, 3, 80, 80)
    opened = open_pass(model, images, PassOptions(batch_size=2))
    torch.set_rng_state(state)
    consumers = [Statistics(opened.tower), _Broken(opened.tower, where)]
    with pytest.raises((RuntimeError, ValueError), match=r"broken|a batch must be"):
        opened.run(*consumers)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert model.config._attn_implementation == implementation
    assert _hooks(model) == hooks
    assert list(opened) == [], "reading has stopped"


def _hooks(model: torch.nn.Module) -> list[int]:
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
