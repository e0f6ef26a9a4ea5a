"""TokenCut gives the partition of the published code, and of its definition, up to the solver's sign."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from discovery_cases import place, reference, reference_keys, scene_features
from scipy.linalg import eigh

from register_adapter.evaluation.discovery import tokencut, tokencut_batch

GRID = {"grid": (10, 10), "patch_size": 8}


@pytest.mark.parametrize("number", range(10))
def test_the_published_code_answers_the_same(number: int) -> None:
    data = reference("tokencut")
    result = tokencut(reference_keys(data, number, "nobias"), **place(data, number))
    theirs = {name: data[f"{number}_nobias_{name}"] for name in ("eigenvector", "bipartition", "seed", "mask", "box")}
    vector = theirs["eigenvector"]
    limit = 1e-6 * np.abs(vector).max()
    assert min(np.abs(result.eigenvector - vector).max(), np.abs(result.eigenvector + vector).max()) < limit
    np.testing.assert_array_equal(result.bipartition, theirs["bipartition"])
    assert result.seed == theirs["seed"]
    np.testing.assert_array_equal(result.mask, theirs["mask"])
    assert result.box == tuple(theirs["box"])


@pytest.mark.parametrize("number", range(10))
def test_a_graph_of_one_kind_of_edge_is_told(number: int) -> None:
    """Keys with their bias are alike everywhere: all eigenvectors are equal, and which comes out is arbitrary."""
    data = reference("tokencut")
    result = tokencut(reference_keys(data, number, "raw"), **place(data, number))
    assert result.eigenvalues == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("tau", [0.2, 0.0, 0.5])
@pytest.mark.parametrize("scene", range(4))
def test_scenes_by_the_definition(scene: int, tau: float) -> None:
    features = scene_features(scene)
    result = tokencut(features, **GRID, tau=tau)
    lengths = np.linalg.norm(features, axis=1)
    weights = np.array(
        [
            [1.0 if features[p] @ features[q] / lengths[p] / lengths[q] > tau else 1e-5 for q in range(100)]
            for p in range(100)
        ]
    )
    degrees = np.diag(weights.sum(1))
    values, vectors = eigh(degrees - weights, degrees)
    assert values[1:3] == pytest.approx(result.eigenvalues, abs=1e-9)
    if values[2] - values[1] < 1e-6:
        pytest.skip("the eigenvector of this scene is not determined")
    vector = vectors[:, 1] * np.sign(vectors[result.seed, 1])
    np.testing.assert_allclose(result.eigenvector.ravel(), vector, atol=1e-9)
    np.testing.assert_array_equal(result.bipartition.ravel(), vector > vector.mean())
    assert np.abs(vector)[result.seed] == pytest.approx(np.abs(vector).max())
    assert result.mask.flat[result.seed]
    assert not (result.mask & ~result.bipartition).any()


def test_batches_and_dtypes_agree() -> None:
    batch = torch.stack([torch.from_numpy(scene_features(seed)) for seed in range(3)])
    for image, result in zip(batch, tokencut_batch(batch, **GRID), strict=True):
        for other in (tokencut(image, **GRID), tokencut(image.numpy(), **GRID), tokencut(image.float(), **GRID)):
            np.testing.assert_array_equal(result.mask, other.mask)
            assert (result.seed, result.box) == (other.seed, other.box)


def test_two_blocks_of_patches_are_told_apart() -> None:
    features = np.zeros((6, 6, 2))
    features[..., 0] = 1
    features[1:3, 2:5] = (0, 1)
    result = tokencut(features.reshape(36, 2), grid=(6, 6), patch_size=10, image_size=(58, 60))
    assert result.box == (20, 10, 50, 30)
    assert result.seed == 1 * 6 + 2


@pytest.mark.parametrize(
    ("options", "said"), [({"eps": 0.0}, "eps must be above 0"), ({"grid": (1, 2), "rows": 2}, "at least three")]
)
def test_what_cannot_be_cut_is_refused(options: dict[str, Any], said: str) -> None:
    features = np.ones((options.pop("rows", 12), 3))
    with pytest.raises(ValueError, match=said):
        tokencut(features, **{"grid": (3, 4), "patch_size": 8, **options})
