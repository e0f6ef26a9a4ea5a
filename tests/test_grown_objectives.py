"""What grown models learn beside their tiles: summaries, mixed images, hidden tiles, two views of an image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from register_adapter.testbed.grown import (
    OBJECTIVES,
    TILE_KINDS,
    Drawn,
    Ensemble,
    MosaicTask,
    Recipe,
    build,
    losses,
    measure,
    objective_of,
    read_grown,
    save_grown,
)
from register_adapter.testbed.grown.mixes import MIXES, mixed
from register_adapter.testbed.grown.mosaics import summary_of

TASK = MosaicTask(grid=5, icons=3, asking=3, background=(4, 6))
SMALL = Recipe(task=TASK, width=32, blocks=2, heads=2, batch_size=4)
#: Name of a case to what it changes.
CASES: dict[str, dict[str, Any]] = {
    "targets": {},
    "pooled": {"task": replace(TASK, summary=4, summary_at="pooled")},
    "mae": {"objective": "mae"},
    "dino": {"objective": "dino"},
    "dino-cls": {"objective": "dino", "cls": True},
    "dino-registers": {"objective": "dino", "registers": 2},
}


def test_only_the_named_tiles_say_the_summary() -> None:
    def said(at: Any) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = replace(TASK, summary=4, summary_at=at).draw(32, seed=3)
        return drawn.targets, drawn.kinds

    every, kinds = said("every")
    summary = every[..., 48:]
    assert torch.equal(summary, summary[:, :1].expand_as(summary))
    assert summary[:, 0].std(0).min() > 0.3
    who = {"asking": kinds == TILE_KINDS.index("asking"), "background": kinds == TILE_KINDS.index("background")}
    for at, says in who.items():
        targets, _ = said(at)
        assert torch.equal(targets[..., :48], every[..., :48])
        assert torch.equal(targets[..., 48:], summary * says[..., None])
    idle, _ = said("idle")
    asking = who["asking"]
    assert idle.shape[-1] == 48
    assert torch.equal(idle[asking], every[asking][:, :48])
    assert torch.equal(idle[~asking][:, 24:28], summary[~asking])
    assert not idle[~asking][:, 28:].any()


@pytest.mark.parametrize("mix", MIXES)
def test_tiles_bring_their_pixels_and_answers_along(mix: str) -> None:
    plain = TASK.draw(16, seed=5)
    blended = mixed(plain, TASK.grid, mix, seed=1)
    other = plain.targets.roll(-1, 0)
    share = ((blended.targets - other) * (plain.targets - other)).sum(-1) / (plain.targets - other).square().sum(-1)
    torch.testing.assert_close(blended.targets, share[..., None] * plain.targets + (1 - share[..., None]) * other)
    torch.testing.assert_close(blended.weights, share * plain.weights + (1 - share) * plain.weights.roll(-1, 0))
    pixels = share.reshape(-1, 1, 5, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = pixels * plain.images + (1 - pixels) * plain.images.roll(-1, 0)
    torch.testing.assert_close(blended.images.float(), expected, atol=0.51, rtol=0)
    whole = ((share - share[:, :1]).abs() < 1e-4).all(1)
    cut = ((share < 1e-4) | (share > 1 - 1e-4)).all(1)
    assert {"mixup": whole.all(), "cutmix": cut.all(), "either": (whole | cut).all()}[mix]
    assert len(share.mean(1).mul(1000).round().unique()) > 2


def test_images_are_drawn_as_ever_without_a_mix() -> None:
    drawn = TASK.draw(4, seed=2)
    assert mixed(drawn, TASK.grid, "", seed=1) is drawn
    with pytest.raises(ValueError, match="mix='blur' is unknown; there are 'mixup', 'cutmix', 'either'"):
        Drawn(replace(SMALL, mix="blur"), (0,))[0]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_an_objective_trains_every_parameter_and_is_measured(changes: dict[str, Any], tmp_path: Any) -> None:
    recipe = replace(SMALL, **changes)
    ensemble, batch = Ensemble(recipe, (5, 6)), Drawn(recipe, (5, 6))[7]
    objective = objective_of(ensemble)
    loss = objective(ensemble, batch)
    assert loss.shape == (2,)
    assert loss.isfinite().all()
    loss.sum().backward()
    still = [name for name, value in zip(ensemble.names, ensemble.stacked, strict=True) if not value.grad.any()]
    assert all(name.endswith("k_proj.bias") or name.endswith("key.bias") for name in still), still
    assert not list(objective.parameters())
    model = ensemble.models()[1]
    measured = measure(model, recipe.task, 8, 8, held_out=objective.held_out)
    assert measured == measure(model, recipe.task, 8, 8, held_out=objective.held_out)
    assert 0 <= measured["loss"] < 2
    assert len(measured["ratio"]) == recipe.blocks + 1
    pixels = TASK.draw(2, seed=1).pixel_values
    tokens = model.backbone(pixel_values=pixels).last_hidden_state
    save_grown(model, TASK, tmp_path)
    torch.testing.assert_close(read_grown(tmp_path).backbone(pixel_values=pixels).last_hidden_state, tokens)


def test_hidden_tiles_are_not_seen() -> None:
    model = build(replace(SMALL, objective="mae", masked=0.6), 0).eval()
    order = torch.stack([torch.randperm(25, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    pixels = TASK.draw(2, seed=1).pixel_values

    def with_noise(tile: int) -> torch.Tensor:
        row, column = divmod(tile, 5)
        changed = pixels.clone()
        changed[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        return model(changed, order)[0]

    seen = model(pixels, order)[0]
    assert not torch.allclose(with_noise(int(order[0, 9])), seen, atol=1e-4)
    torch.testing.assert_close(with_noise(int(order[0, 10])), seen)


def test_a_query_says_the_summary_and_no_tile_does() -> None:
    recipe = replace(SMALL, task=replace(TASK, summary=4, summary_at="pooled"))
    drawn = recipe.task.draw(4, seed=2)
    assert not drawn.targets[..., 48:].any()
    right = torch.cat([torch.zeros(4, 1, 52), drawn.targets], 1)
    right[:, 0, 48:] = summary_of(recipe.task, drawn.targets[..., :24])
    assert losses(right[None], drawn.targets[None], drawn.weights[None], recipe) == 0
    wrong = right.clone()
    wrong[:, 0, 48:] += 1
    torch.testing.assert_close(
        losses(wrong[None], drawn.targets[None], drawn.weights[None], recipe), torch.tensor([4 / 52])
    )


def test_the_teacher_is_an_average_of_the_student() -> None:
    ensemble = Ensemble(replace(SMALL, objective="dino"), (0,))
    objective = objective_of(ensemble)
    before = objective.get_buffer("average_0").clone()
    with torch.no_grad():
        ensemble.stacked[0] += 1
    objective.follow(ensemble)
    torch.testing.assert_close(objective.get_buffer("average_0"), before + 0.01)
    objective(ensemble, Drawn(ensemble.recipe, (0,))[0])
    assert objective.get_buffer("centre").any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "clip"}, "objective='clip' is unknown; there are 'targets', 'mae', 'dino'"),
        ({"objective": "mae", "cls": True}, "cls=True and registers=0"),
        ({"objective": "mae", "registers": 4}, "cls=False and registers=4"),
    ],
)
def test_what_cannot_be_learned_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_of(Ensemble(replace(SMALL, **changes), (0,)))
    assert "clip" not in OBJECTIVES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backdrop": "photo"}, "backdrop='photo' is unknown; there are 'pale', 'photographs'"),
        ({"summary_at": "asked"}, "summary_at='asked' is unknown; there are 'every', 'asking', 'background', 'idle'"),
        ({"summary_at": "pooled"}, "summary=0 with summary_at='pooled': it takes at least 1"),
        ({"summary_at": "idle", "summary": 25}, "summary=25 with summary_at='idle': it takes 0 to 24, the numbers"),
    ],
)
def test_a_task_that_cannot_be_drawn_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MosaicTask(**changes)
