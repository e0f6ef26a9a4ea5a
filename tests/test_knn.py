"""k-NN on frozen features: as scikit-learn computes it, in chunks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from datasets import Image as ImageColumn
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from register_adapter import add_registers, capture
from register_adapter.evaluation import evaluate_knn
from register_adapter.evaluation.downstream import label_images, read_features, vote
from register_adapter.evaluation.downstream.neighbours import chunk_sizes
from register_adapter.evaluation.downstream.reading import Reading
from register_adapter.features.store import StoreError
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit


class Drawn:
    """Scenes that are drawn once."""

    def __init__(self, count: int, seed: int) -> None:
        self.items = list(SceneDataset(count, seed=seed, split=None))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@pytest.fixture(scope="module")
def train() -> Drawn:
    return Drawn(40, 1)


@pytest.fixture(scope="module")
def test() -> Drawn:
    return Drawn(16, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_planted_vit().model


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_image_processor()


@pytest.fixture(scope="module")
def vectors() -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    train = torch.randn(300, 24, generator=rng)
    return train, torch.randint(0, 7, (300,), generator=rng).numpy(), torch.randn(50, 24, generator=rng)


# The vote


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("budget", [2**28, 60_000])
def test_votes_are_scikit_learns(vectors: Any, temperature: float, budget: int) -> None:
    train, labels, queries = vectors
    votes = vote(train, labels, queries, k=(1, 10, 20), temperature=temperature, budget=budget)
    for k, shares in votes.items():
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(train.double().numpy(), labels)
        np.testing.assert_allclose(shares, reference.predict_proba(queries.double().numpy()), atol=2e-5)


def test_chunks_fit_into_the_budget_and_change_nothing(vectors: Any) -> None:
    train, labels, queries = vectors
    whole = vote(train, labels, queries, k=(20,))[20]
    for budget in (30_000, 80_000, 10**6):
        rows, columns = chunk_sizes(50, 300, 20, 24, budget)
        assert 4 * (rows * columns + columns * 24) <= budget
        np.testing.assert_allclose(vote(train, labels, queries, k=(20,), budget=budget)[20], whole, atol=1e-6)
    with pytest.raises(ValueError, match="budget=1000 bytes is too small; one query with k=20 needs"):
        vote(train, labels, queries, k=(20,), budget=1000)


def test_memory_is_flat_at_a_hundredth_of_imagenet() -> None:
    """1.28 M images of 768 values: chunks of a given budget, whatever the number of training images."""
    sizes = []
    for count in (3_200, 12_800):
        train = torch.full((1, 768), 0.5).expand(count, -1)  # no memory of its own
        queries = torch.ones(500, 768)
        with _Peak() as peak:
            vote(train, np.zeros(count, int), queries, k=(200,), budget=2**23)
        sizes.append(peak.elements * 4)
    assert sizes[1] <= sizes[0] * 1.02
    assert 0 < sizes[1] <= 2**23
    rows, columns = chunk_sizes(50_000, 1_281_167, 200, 768, 2**28)
    assert rows >= 64
    assert 4 * (rows * columns + columns * 768) <= 2**28


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its largest size")
def test_the_process_does_not_grow() -> None:
    """All similarities at once would take 49 MiB."""
    queries = torch.ones(1_000, 768)
    grown = []
    for count in (3_200, 12_800):
        train = torch.full((1, 768), 0.5).expand(count, -1)
        Path("/proc/self/clear_refs").write_text("5")  # the largest size from now on
        before = _size("VmRSS")
        vote(train, np.zeros(count, int), queries, k=(200,), budget=2**23)
        grown.append(_size("VmHWM") - before)
    assert grown[1] < 24 * 2**20


def _size(kind: str) -> int:
    """Bytes of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


class _Peak(torch.overrides.TorchFunctionMode):
    """The elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, torch.Tensor) and function is not torch.full:
                self.elements = max(self.elements, value.untyped_storage().nbytes() // 4)
        return result


def test_more_neighbours_than_images_is_an_error(vectors: Any) -> None:
    train, labels, queries = vectors
    with pytest.raises(ValueError, match="k=301 of 300"):
        vote(train, labels, queries, k=(301,))


# Features


@pytest.mark.parametrize("registers", [0, 3])
def test_features_are_what_the_model_returns(train: Drawn, processor: Any, registers: int) -> None:
    model = load_vit()
    model = add_registers(model, num_registers=registers).eval() if registers else model
    images = [item["image"] for item in train.items[:5]]
    pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
    read = read_features(model, images, blocks=2, patches=True, reading=Reading(processor, batch_size=2))
    with torch.no_grad(), capture(model, attentions=False) as trace:
        model(pixel_values=pixels)
    vit = model.get_base_model().vit if registers else model.vit
    norm = vit.layernorm.forward
    for place, layer in ((-1, -1), (-2, -2)):
        hidden = trace.hidden_states[layer]
        assert read.cls is not None
        with torch.no_grad():
            torch.testing.assert_close(read.cls[:, place], norm(hidden[:, 0]), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(read.mean[:, place], norm(trace.patches(layer)).mean(1), atol=1e-5, rtol=1e-5)
    assert read.patches is not None
    with torch.no_grad():
        torch.testing.assert_close(read.patches, norm(trace.patches(-1)), atol=1e-5, rtol=1e-5)


def test_bad_images_are_left_out_by_number(train: Drawn, model: Any, processor: Any, tmp_path: Path) -> None:
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.png")
        train.items[number]["image"].save(paths[-1])
    paths[1].write_bytes(b"none")
    read = read_features(model, paths, reading=Reading(processor))
    assert read.numbers.tolist() == [0, 2, 3]
    assert len(read.mean) == 3


def test_several_resolutions_are_refused(model: Any) -> None:
    def processor(image: Image.Image) -> torch.Tensor:
        return torch.zeros(3, image.height, image.width)

    images = [Image.new("RGB", (80, 80)), Image.new("RGB", (96, 80))]
    with pytest.raises(ValueError, match="several resolutions"):
        read_features(model, images, reading=Reading(processor, batch_size=1))
    data = [(images[:1], [0]), (images[1:], [0])]
    with pytest.raises(ValueError, match="several resolutions"):
        evaluate_knn(model, *data, k=(1,), image_processor=processor)


# The evaluation


@pytest.mark.slow
def test_models_side_by_side(model: Any, train: Drawn, test: Drawn, processor: Any) -> None:
    report = evaluate_knn(
        {"planted": model, "clean": load_vit()}, train, test, k=(1, 5, 100), image_processor=processor
    )
    assert [(row.setting, row.model) for row in report.rows] == [
        (f"k = {k}", name) for k in (1, 5) for name in ("planted", "clean")
    ]
    assert report.notes[-1] == "40 training images: no larger k"
    read = [
        read_features(model, [item["image"] for item in data.items], reading=Reading(processor))
        for data in (train, test)
    ]
    labels = [[item["label"] for item in data.items] for data in (train, test)]
    reference = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(read[0].cls[:, 0].double().numpy(), labels[0])  # type: ignore[index]
    right = reference.predict(read[1].cls[:, 0].double().numpy()) == np.array(labels[1])  # type: ignore[index]
    row = report.row("planted", "k = 5")
    assert row.values == tuple(right.astype(float))
    assert row.score.value == right.mean()
    assert row.difference is None
    other = report.row("clean", "k = 5")
    assert other.difference is not None
    assert other.difference.value == pytest.approx(other.score.value - row.score.value)
    assert report.to_dict()["settings"]["feature"] == "cls"
    assert "| k = 5 | clean |" in str(report)


@pytest.mark.slow
def test_a_pair_and_a_folder_say_the_same(
    model: Any, train: Drawn, test: Drawn, processor: Any, tmp_path: Path
) -> None:
    for name, data in (("train", train), ("test", test)):
        for number, item in enumerate(data.items[:12]):
            folder = tmp_path / name / f"{item['label'] % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            item["image"].save(folder / f"{number}.png")
    by_folder = evaluate_knn(model, tmp_path / "train", tmp_path / "test", k=(3,), image_processor=processor)
    pixels = [
        torch.cat([processor(item["image"], return_tensors="pt")["pixel_values"] for item in data.items[:12]])
        for data in (train, test)
    ]
    labels = [[item["label"] % 3 for item in data.items[:12]] for data in (train, test)]
    by_pair = evaluate_knn(model, (pixels[0], labels[0]), (pixels[1], labels[1]), k=(3,))
    assert by_folder.rows[0].score == by_pair.rows[0].score
    assert by_folder.settings["classes"] == ["0", "1", "2"]


@pytest.mark.slow
def test_a_store_is_filled_once_and_read_afterwards(
    model: Any, train: Drawn, test: Drawn, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"k": (5,), "image_processor": processor, "store": tmp_path}
    plain = evaluate_knn(model, train, test, k=(5,), image_processor=processor)
    first = evaluate_knn(model, train, test, **arguments)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(shards) == 2
    again = evaluate_knn(model, train, test, **arguments)
    assert plain.rows[0].values == first.rows[0].values == again.rows[0].values
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == shards
    evaluate_knn(load_vit(), train, test, **arguments)  # another model
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    next(iter(shards)).write_bytes(b"damaged")
    with pytest.raises(StoreError, match="damaged"):
        evaluate_knn(model, train, test, **arguments)


def test_images_in_both_sets_are_refused_by_name(model: Any, train: Drawn, tmp_path: Path, processor: Any) -> None:
    for name in ("train", "test"):
        (tmp_path / name / "a").mkdir(parents=True)
        train.items[0]["image"].save(tmp_path / name / "a" / f"{name}.png")
    with pytest.raises(ValueError, match=r"1 of 1 test images are training images too.*test\.png is .*train\.png"):
        evaluate_knn(model, tmp_path / "train", tmp_path / "test", k=(1,), image_processor=processor)
    with pytest.raises(ValueError, match="4 of 4 test images"):
        evaluate_knn(model, train, Drawn(4, 1), k=(1,), image_processor=processor)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": ()}, "k must be"),
        ({"k": (50,)}, "40 training images, and the smallest k is 50"),
        *[({"temperature": value}, "temperature") for value in (0.0, -1.0, 1e-50, float("nan"), float("inf"))],
        ({"feature": "dogs"}, "feature='dogs'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_is_out_of_range_is_refused(
    model: Any, train: Drawn, test: Drawn, processor: Any, change: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate_knn(model, train, test, **{"image_processor": processor, "k": (1,), **change})


def _as_data_set(names: list[str], of_images: list[str], seed: int) -> Dataset:
    images = [item["image"] for item in SceneDataset(len(of_images), seed=seed, split=None)]
    columns = {"image": images, "label": [names.index(name) for name in of_images]}
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=names)).cast_column("image", ImageColumn())


@pytest.mark.parametrize("names", [["a", "b", "c"], ["c", "b", "a"], ["none", "a", "b", "c"], ["c", "a"]])
def test_classes_of_a_test_set_are_found_by_name(names: list[str], model: Any, processor: Any) -> None:
    learned = _as_data_set(["a", "b", "c"], ["a", "b", "c", "a"], 1)
    asked = _as_data_set(names, ["c", "a", "c"], 2)
    assert label_images(asked, ("a", "b", "c")).labels.tolist() == [2, 0, 2]
    assert label_images(asked, ("a", "b", "c")).classes == ("a", "b", "c")
    images = [item["image"] for item in SceneDataset(3, seed=2, split=None)]
    reports = [
        evaluate_knn(model, learned, test, k=(1,), image_processor=processor) for test in (asked, (images, [2, 0, 2]))
    ]
    assert reports[0].rows[0].values == reports[1].rows[0].values


def test_classes_that_the_training_set_lacks_or_does_not_name() -> None:
    asked = _as_data_set(["x", "a"], ["a", "x"], 2)
    with pytest.raises(ValueError, match=r"the test set has the classes \['x'\], which the training set lacks"):
        label_images(asked, ("a", "b"))
    assert label_images(asked, ("0", "1", "2")).labels.tolist() == [1, 0]  # of a training set with numbers only
    bare = Dataset.from_dict({"image": asked["image"], "label": [1, 0]}).cast_column("image", ImageColumn())
    assert label_images(bare, ("a", "b")).labels.tolist() == [1, 0]
    unlabelled = (
        asked.remove_columns("label").add_column("label", [-1, 1]).cast_column("label", asked.features["label"])
    )
    with pytest.raises(ValueError, match="labels must be from 0"):
        label_images(unlabelled, ("a", "b"))
