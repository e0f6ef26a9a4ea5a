"""LOST gives what the published code and its definition, computed patch by patch, give."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from discovery_cases import place, reference, reference_keys, scene_features

from register_adapter.evaluation.discovery import LostObject, lost, lost_batch

OPTIONS: dict[str, dict[str, Any]] = {"raw": {}, "nobias": {}, "normed": {"normalize": True, "bias": -0.2}}
GRID = {"grid": (10, 10), "patch_size": 8}


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("number", range(10))
def test_the_published_code_answers_the_same(number: int, variant: str) -> None:
    data = reference("lost")
    result = lost(reference_keys(data, number, variant), **place(data, number), **OPTIONS[variant])
    theirs = {name: data[f"{number}_{variant}_{name}"] for name in ("degree", "seed", "similars", "mask", "box")}
    np.testing.assert_array_equal(result.degree, theirs["degree"])
    assert result.degree[result.seed] == theirs["degree"].min()
    # Which of several patches of one degree comes first is torch's choice.
    order = torch.argsort(-torch.from_numpy(result.degree).float(), descending=True)[:100].numpy()
    if not np.array_equal(order, data[f"{number}_{variant}_order100"]):
        pytest.skip("this build of torch orders equal degrees otherwise than the reference's")
    assert result.seed == theirs["seed"]
    assert set(result.similars) == set(theirs["similars"])
    np.testing.assert_array_equal(result.mask, theirs["mask"])
    assert result.box == tuple(theirs["box"])


def by_definition(
    features: npt.NDArray[Any], grid: tuple[int, int], patch: int, k: int, bias: float
) -> tuple[npt.NDArray[Any], int, set[int], npt.NDArray[Any], tuple[int, ...]]:
    """Degree, seed, set, mask and box, one patch at a time."""
    count = len(features)
    alike = np.array([[float(p @ q) + bias for q in features] for p in features])
    degree = np.array([sum(alike[p, q] > 0 for q in range(count) if q != p) for p in range(count)])
    order = torch.argsort(-torch.from_numpy(degree).float(), descending=True).tolist()
    seed, lowest = order[0], order[:k]
    similars = {s for s in lowest if alike[seed, s] > 0}
    inside = np.array([sum(alike[s, p] for s in similars) > 0 for p in range(count)]).reshape(grid)
    mask, waiting = np.zeros(grid, bool), [divmod(seed, grid[1])]
    while waiting:
        row, column = waiting.pop()
        if 0 <= row < grid[0] and 0 <= column < grid[1] and inside[row, column] and not mask[row, column]:
            mask[row, column] = True
            waiting += [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    rows, columns = np.nonzero(mask)
    box = tuple(int(patch * v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return degree, seed, similars, mask, box


@pytest.mark.parametrize(("k", "bias"), [(100, 0.0), (20, 0.0), (30, -0.01), (500, 0.5)])
@pytest.mark.parametrize("scene", range(4))
def test_scenes_by_the_definition(scene: int, k: int, bias: float) -> None:
    features = scene_features(scene)
    result = lost(features, **GRID, k_patches=k, bias=bias)
    degree, seed, similars, mask, box = by_definition(features, (10, 10), 8, k, bias)
    np.testing.assert_array_equal(result.degree, degree)
    assert (result.seed, set(result.similars), result.box) == (seed, similars, box)
    np.testing.assert_array_equal(result.mask, mask)
    assert result.mask.flat[result.seed]


def test_more_patches_than_are_compared_at_a_time() -> None:
    features = np.random.default_rng(0).standard_normal((21 * 20, 12))
    alike = features @ features.T
    np.fill_diagonal(alike, 0)
    result = lost(features, grid=(21, 20), patch_size=4)
    np.testing.assert_array_equal(result.degree, (alike > 0).sum(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numpy_and_torch_and_batches_agree(dtype: torch.dtype) -> None:
    batch = torch.stack([torch.from_numpy(scene_features(seed)) for seed in range(3)]).to(dtype)
    for image, result in zip(batch, lost_batch(batch, **GRID), strict=True):
        wide = image if dtype == torch.float64 else image.float()
        for other in (lost(image.requires_grad_(), **GRID), lost(wide.detach().numpy(), **GRID)):
            assert same(result, other)


def same(first: LostObject, other: LostObject) -> bool:
    names = ("degree", "similars", "mask")
    arrays = all(np.array_equal(getattr(first, name), getattr(other, name)) for name in names)
    return arrays and (first.seed, first.box) == (other.seed, other.box)


def test_torch_counts_as_numpy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from register_adapter.evaluation.discovery import seed_expansion

    batch = np.stack([scene_features(seed) for seed in range(3)])
    expected = lost_batch(batch, **GRID, bias=-0.3)
    monkeypatch.setattr(seed_expansion, "_counters", {})
    assert all(map(same, lost_batch(batch, **GRID, bias=-0.3), expected))


def test_a_box_ends_where_the_image_does() -> None:
    features = np.ones((12, 3))
    result = lost(features, grid=(3, 4), patch_size=16, image_size=(40, 50))
    assert result.box == (0, 0, 50, 40)
    assert lost(features, grid=(3, 4), patch_size=16).box == (0, 0, 64, 48)


@pytest.mark.parametrize("bias", [0.0, -2.0])
def test_a_seed_unlike_itself_stands_alone(bias: float) -> None:
    features = np.zeros((12, 3)) if not bias else np.eye(12)
    result = lost(features, grid=(3, 4), patch_size=16, bias=bias)
    assert result.mask.sum() == 1
    assert result.mask.flat[result.seed]
    assert len(result.similars) == 0


@pytest.mark.parametrize(
    ("features", "options", "said"),
    [
        (np.ones((13, 3)), {}, "leave CLS"),
        (np.ones(12), {}, r"\(P, D\)"),
        (np.full((12, 3), np.nan), {}, "NaN"),
        (np.ones((12, 3)), {"k_patches": 0}, "k_patches"),
        (np.ones((12, 3)), {"image_size": (64, 48)}, "does not fit a grid"),
        (np.ones((2, 12, 3)), {}, "lost_batch"),
    ],
)
def test_what_does_not_fit_is_refused(features: npt.NDArray[Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lost(features, grid=(3, 4), patch_size=16, **options)
