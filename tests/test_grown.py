"""Models whose artifacts grew by themselves: the images, the growth, and what is packaged of it."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from register_adapter.testbed import MosaicDataset, MosaicTask, load_grown, load_shipped
from register_adapter.testbed.grown import (
    RECIPES,
    TILE_KINDS,
    TWINS,
    Drawn,
    Ensemble,
    Recipe,
    build,
    losses,
    measure,
    read_grown,
)
from register_adapter.testbed.grown.mosaics import normalised
from register_adapter.testbed.grown.packaged import WEIGHTS
from register_adapter.testbed.vit import load_image_processor, load_planted_vit, load_vit
from register_adapter.utils.shipped import GROWN, GROWN_TILES

SMALL = Recipe(task=MosaicTask(grid=5, icons=3, asking=3, background=(4, 6)), width=32, blocks=2, heads=2, batch_size=4)
SCRIPT = Path(__file__).parent.parent / "scripts" / "grow_testbed.py"


@pytest.mark.parametrize(
    "changes", [{}, {"padding": 2}, {"summary": 8}, {"backdrop": "photographs"}, {"grid": 7, "asking": 8}]
)
def test_what_an_asking_tile_is_to_say_is_what_the_asked_one_holds(changes: dict[str, Any]) -> None:
    task = MosaicTask(**changes)
    drawn = task.draw(8, seed=3)
    assert drawn.images.shape == (8, 3, task.image_size, task.image_size)
    assert drawn.targets.shape == (8, task.num_patches, task.num_targets)
    counts = torch.nn.functional.one_hot(drawn.kinds, len(TILE_KINDS)).sum(1)
    assert (counts[:, TILE_KINDS.index("icon")] == task.icons).all()
    assert (counts[:, TILE_KINDS.index("asking")] == task.asking).all()
    assert (counts[:, TILE_KINDS.index("padding")] == task.padding * task.grid).all()
    asking = drawn.kinds == TILE_KINDS.index("asking")
    assert torch.equal(drawn.asked >= 0, asking)
    own, fetched = drawn.targets[..., : task.contents], drawn.targets[..., task.contents : 2 * task.contents]
    image, place = torch.where(asking)
    assert torch.equal(fetched[image, place], own[image, drawn.asked[image, place]])
    assert (drawn.kinds[image, drawn.asked[image, place]] == TILE_KINDS.index("icon")).all()
    assert not fetched[~asking].any()


def test_pictures_depend_on_their_number_and_the_seed_alone() -> None:
    first, second = MosaicDataset(200, seed=1), MosaicDataset(200, seed=1)
    late = second[150]["image"]
    assert first[150]["image"].tobytes() == late.tobytes()
    assert first[3]["image"].tobytes() == second[3]["image"].tobytes()
    assert first[3]["image"].tobytes() != MosaicDataset(200, seed=2)[3]["image"].tobytes()
    with pytest.raises(IndexError, match="image 200 of a set of 200"):
        first[200]


@pytest.mark.parametrize(("recipe", "name"), [("mosaics", GROWN), ("tiles", GROWN_TILES)])
def test_the_packaged_processor_gives_the_values_that_the_model_grew_on(recipe: str, name: str) -> None:
    data = MosaicDataset(2, RECIPES[recipe].task)
    values = load_image_processor(WEIGHTS / recipe)(data[1]["image"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, data.mosaic(1).pixel_values, atol=1e-6, rtol=0)
    assert load_shipped(name)(pixel_values=values).last_hidden_state.shape[1] == RECIPES[recipe].task.num_patches


@pytest.mark.parametrize("recipe", ["mosaics", "tiles"])
def test_artifacts_grew_and_the_twin_with_registers_has_none(recipe: str) -> None:
    task = RECIPES[recipe].task
    grown, twin = (measure(load_grown(recipe, twin), task, 64) for twin in (None, "registers"))
    assert max(grown["ratio"]) > 5
    assert max(grown["outliers"]) > 0.01
    assert max(grown["attention"]) > 0.8
    assert next(share for share in grown["on_background"] if share is not None) > 0.99
    assert max(twin["ratio"]) < 2
    assert grown["loss"] < 0.003
    assert twin["loss"] < 0.003


def test_an_unknown_grown_model_is_named() -> None:
    with pytest.raises(ValueError, match="no grown model 'mosaics-cls' is shipped; there are 'mosaics', 'tiles'"):
        load_grown("mosaics", "cls")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [(3,), (None,), (["tiles"],), ("",), ("tiles", 1), ("tiles", "")], ids=str)
def test_what_is_no_grown_model_is_named(given: Any) -> None:
    with pytest.raises(ValueError, match="there are 'mosaics', 'tiles'") as refused:
        load_grown(*given)
    assert all(repr(value) in str(refused.value) for value in given)


@pytest.mark.parametrize("load", [load_vit, load_planted_vit, load_image_processor, read_grown, load_shipped])
@pytest.mark.parametrize("given", ["x", 3, None, ["clean"]], ids=str)
def test_what_is_no_folder_of_a_shipped_model_is_named(load: Any, given: Any) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match="register-adapter://planted") as refused:
        load(given)
    assert repr(given) in str(refused.value)


@pytest.mark.parametrize("twin", [None, *TWINS])
def test_seeds_that_grow_side_by_side_grow_as_each_alone(twin: str | None) -> None:
    recipe = replace(SMALL, **TWINS.get(twin or "", {}))
    ensemble, batch = Ensemble(recipe, (5, 6)), Drawn(recipe, (5, 6))[7]
    pixels = normalised(batch["images"])
    each = losses(ensemble(pixels), batch["targets"], batch["weights"], recipe)
    each.sum().backward()
    alone = build(recipe, 6)
    loss = losses(alone(pixels[1])[None], batch["targets"][1:], batch["weights"][1:], recipe)[0]
    loss.backward()
    torch.testing.assert_close(each[1], loss)
    for name, value, stacked in zip(ensemble.names, alone.parameters(), ensemble.stacked, strict=True):
        torch.testing.assert_close(stacked.grad[1], value.grad, msg=name, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", ["targets", "dino"])
def test_a_stopped_growth_goes_on_to_the_same_models(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [
        f"objective={objective}",
        "task.grid=5",
        "task.icons=3",
        "task.asking=3",
        "task.background=(4, 6)",
        "blocks=2",
        "batch_size=4",
    ]

    def grow(folder: str, steps: int) -> Path:
        options = f"--seeds 0 1 --num_workers 0 --measure_every 2 --checkpointing_steps 2 --cpu --name {folder}"
        arguments = ["grow_testbed.py", "tiles", *options.split(), "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*arguments, "--set", *changes, f"steps={steps}"])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return tmp_path / folder / "seed-1"

    whole = grow("whole", 4)
    grow("stopped", 2)
    resumed = grow("stopped", 4)
    for file in ("model.safetensors", "head.safetensors"):
        first, second = load_file(whole / file), load_file(resumed / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())
