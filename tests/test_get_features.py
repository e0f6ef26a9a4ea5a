"""Features of images by one call: the tokens of the model itself, from any images, each row with its image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import families
import numpy as np
import peft
import pytest
import stacks_cases
import torch
from helpers import hooks

from register_adapter import RegisterConfig, UnsupportedModelError, add_registers, capture, compose, get_features
from register_adapter.data import ImageFileError
from register_adapter.features.extraction.tokens import KINDS
from register_adapter.features.projections import keep_projection
from register_adapter.testbed import SceneDataset, load_image_processor, load_vit
from register_adapter.towers import find_tower

#: Kinds of model without CLS, and with tokens behind the patches.
NO_CLS = ("siglip-vision", "siglip2-vision", "pix2struct-vision", "molmo2-vision")
#: Registers that kinds of model have of their own.
NATIVE = {"radio": 2, "dinov2-registers": 3, "dinov3": 3}
BLOCKS = 8


@pytest.fixture(scope="module")
def vit() -> Any:
    return load_vit()


@pytest.fixture(scope="module")
def adapted() -> Any:
    return add_registers(load_vit(), 3).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(5, 3, 80, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, two of them in a folder below; the third is damaged."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    scenes = SceneDataset(6, seed=8, split=None)
    for number in range(6):
        path = root / (f"more/{number}.png" if number > 3 else f"{number}.png")
        scenes[number]["image"].save(path)
        if number == 2:
            path.write_bytes(path.read_bytes()[:60])
    return root


# What is read


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_tokens_are_those_of_the_hidden_states(adapted: Any, pixels: torch.Tensor, layer: int) -> None:
    read = get_features(adapted, pixels, layer, ["patch", "cls", "registers", "mean"], norm=False, batch_size=2)
    with torch.no_grad(), capture(adapted, attentions=False) as trace:
        adapted(pixel_values=pixels)
    hidden = trace.hidden_states[layer]
    torch.testing.assert_close(read["cls"], hidden[:, 0])
    torch.testing.assert_close(read["registers"], hidden[:, 1:4])
    torch.testing.assert_close(read["patch"], hidden[:, 4:])
    torch.testing.assert_close(read["mean"], hidden[:, 4:].mean(1))
    assert (read.grid, len(read), read.index.tolist()) == ((10, 10), 5, [0, 1, 2, 3, 4])


def test_the_last_layer_is_as_the_model_returns_it(adapted: Any, pixels: torch.Tensor) -> None:
    read = get_features(adapted, pixels, what=("cls", "patch", "registers"))
    with torch.no_grad(), capture(adapted, attentions=False) as trace:
        states = adapted.base_model.model.vit(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(read["cls"], states[:, 0])
    torch.testing.assert_close(read["patch"], states[:, 1:])
    torch.testing.assert_close(read["registers"], trace.registers)


@pytest.mark.parametrize("layer", [2, -1])
@pytest.mark.parametrize("kind", ["keys", "queries", "values"])
def test_projections_are_those_of_the_block_whose_output_the_layer_is(
    adapted: Any, pixels: torch.Tensor, kind: Any, layer: int
) -> None:
    read = get_features(adapted, pixels, layer, kind)
    with torch.no_grad(), keep_projection(find_tower(adapted), (layer - 1) % (BLOCKS + 1) % BLOCKS, kind) as kept:
        adapted(pixel_values=pixels)
    torch.testing.assert_close(read[kind], kept[0][:, 4:])


@pytest.mark.parametrize("name", families.KINDS)
def test_every_kind_of_model(name: str) -> None:
    model, inputs = families.build(name), families.make_inputs(name)
    kinds = [kind for kind in KINDS if kind != "registers" and not (kind == "cls" and name in NO_CLS)]
    table = get_features(model, [inputs], what=kinds)
    rows = table["patch"].shape[1]
    assert rows == families.PATCHES
    assert table.grid in ((4, 4), None)
    assert all(table[kind].shape == (2, families.WIDTH) for kind in kinds if kind in ("cls", "mean"))
    assert all(table[kind].shape[:2] == (2, rows) for kind in ("keys", "queries", "values"))
    own = get_features(add_registers(model, 2), [inputs], what="registers")["registers"]
    assert own.shape[0] == 2
    assert own.shape[1] == 2 + NATIVE.get(name, 0)


@pytest.mark.parametrize("name", ["timm", "eva", "open_clip", "torchvision", "hub"])
def test_other_libraries(name: str) -> None:
    model = stacks_cases.build_stack(name)
    table = get_features(model, stacks_cases.images(), what=["patch", "cls", "keys"])
    assert table["patch"].shape == table["keys"].shape == (2, families.PATCHES, families.WIDTH)


def test_adapters_are_chosen_and_composed_models_are_read(pixels: torch.Tensor) -> None:
    lora = peft.LoraConfig(target_modules=["q_proj", "query"], init_lora_weights=False)
    model = peft.get_peft_model(load_vit(), lora)
    plain, changed = (get_features(subject, pixels)["patch"] for subject in ((model, None), model))
    torch.testing.assert_close(plain, get_features(load_vit(), pixels)["patch"])
    assert not torch.allclose(plain, changed, atol=1e-3)
    both = compose(load_vit(), {"registers": RegisterConfig(num_registers=2), "lora": lora})
    read = get_features(both, pixels, what=["registers", "patch"])
    assert read["registers"].shape == (5, 2, 128)
    assert not torch.allclose(read["patch"], plain, atol=1e-3)


# Images and rows


def test_rows_are_of_the_images_that_are_good(vit: Any, folder: Path) -> None:
    processor = load_image_processor()
    table = get_features(vit, folder, what="cls", image_processor=processor, batch_size=2, max_images=5)
    assert table.files == ("0.png", "1.png", "3.png", "more/4.png")
    assert table.index.tolist() == [0, 1, 3, 4]
    assert [line.count("2.png") for line in table.skipped] == [1]
    paths = [folder / "3.png", folder / "more" / "4.png"]
    chosen = get_features(vit, paths, what="cls", image_processor=processor)
    assert chosen.files == tuple(map(str, paths))
    torch.testing.assert_close(chosen["cls"], table["cls"][2:])
    with pytest.raises(ImageFileError, match=r"2\.png"):
        get_features(vit, folder, image_processor=processor, strict=True)


def test_any_images_give_the_same_rows(vit: Any, folder: Path) -> None:
    processor = load_image_processor()
    paths = [folder / "0.png", folder / "3.png"]
    wanted = get_features(vit, paths, image_processor=processor)["patch"]
    images = [SceneDataset(6, seed=8, split=None)[number]["image"] for number in (0, 3)]
    ready = processor(images, return_tensors="pt")["pixel_values"]
    table = datasets.Dataset.from_dict({"image": list(map(str, paths)), "label": [7, 8]})
    given = (
        images,
        iter(images),
        list(ready),
        ready,
        [ready[:1], ready[1:]],
        table.cast_column("image", datasets.Image()),
    )
    for each in given:
        read = get_features(vit, each, image_processor=processor)
        torch.testing.assert_close(read["patch"], wanted, msg=str(type(each)))
        assert read.index.tolist() == [0, 1]


def test_formats_hold_the_same(vit: Any, folder: Path) -> None:
    options: Any = {"what": ["patch", "cls"], "image_processor": load_image_processor()}
    tensors = get_features(vit, folder, **options)
    arrays = get_features(vit, folder, format="numpy", **options)
    rows = get_features(vit, folder, format="datasets", **options)
    assert isinstance(arrays.index, np.ndarray)
    for kind in ("patch", "cls"):
        np.testing.assert_array_equal(tensors[kind].numpy(), arrays[kind])
        np.testing.assert_array_equal(rows[:][kind], arrays[kind])
    assert rows.column_names == ["index", "file", "patch", "cls"]
    assert rows[2]["file"] == "3.png"
    assert rows.features["patch"].shape == arrays["patch"].shape[1:]


def test_a_token_does_not_keep_the_sequence(vit: Any, pixels: torch.Tensor) -> None:
    from register_adapter.features.extraction.reading import Wanted, each_batch
    from register_adapter.features.passes import PassOptions

    for norm in (True, False):
        for batch in each_batch(vit, pixels[:1], Wanted(("cls",), norm=norm), PassOptions()):
            assert batch.values["cls"].untyped_storage().nbytes() == batch.values["cls"].nbytes


def test_the_model_is_left_as_it_was(pixels: torch.Tensor) -> None:
    model = add_registers(load_vit(), 1).train()
    before = hooks(model)
    get_features((model, None), pixels)
    with pytest.raises(ValueError, match="several resolutions"):
        get_features(model, [pixels, pixels[..., :72]], what=["cls", "keys"])
    assert hooks(model) == before
    assert model.training
    assert list(model.active_adapters) == ["default"]


@pytest.mark.parametrize("active", [["default", "b"], ["b"]], ids=["several", "one"])
def test_the_name_that_peft_keeps_is_left_too(pixels: torch.Tensor, active: list[str]) -> None:
    """It names the adapter of ``active_peft_config`` and of a checkpoint; the tuner may have others at work."""
    model: Any = peft.get_peft_model(load_vit(), peft.LoraConfig(target_modules=["query", "q_proj"]))
    for name in ("b", "c"):
        model.add_adapter(name, peft.LoraConfig(target_modules=["query", "q_proj"]))
    model.base_model.set_adapter(active)
    for name in ("b", "c", None):
        get_features((model, name), pixels[:1])
        assert (model.active_adapter, list(model.active_adapters)) == ("default", active)


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"what": "tokens"}, "what='tokens', expected some of patch, mean, cls"),
        ({"what": []}, r"what=\[\], expected"),
        ({"what": "keys", "layer": 0}, "layer=0 is the input of the first block and has no keys"),
        ({"layer": 9}, "layer=9 of 9"),
        ({"what": "registers"}, "ViTModel has no registers at layer 8: neither the model nor an adapter"),
        ({"format": "jax"}, "format='jax', expected one of torch, numpy, datasets"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(vit: Any, pixels: torch.Tensor, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_features(vit, pixels, **options)


def test_registers_that_are_no_tokens_there_are_refused(pixels: torch.Tensor) -> None:
    late = add_registers(load_vit(), 2, insert_layer=4)
    assert get_features(late, pixels, 5, "registers")["registers"].shape == (5, 2, 128)
    with pytest.raises(ValueError, match=r"no registers at layer 4: .* enter at a later block"):
        get_features(late, pixels, 4, "registers")
    with pytest.raises(ValueError, match="are key/value pairs"):
        get_features(add_registers(load_vit(), 2, key_value=True), pixels, what="registers")


@pytest.mark.parametrize("name", [name for name in NO_CLS if name in families.CASES])
def test_no_cls_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="has no CLS token; what='mean'"):
        get_features(families.build(name), [families.make_inputs(name)], what="cls")


def test_shuffled_patches_are_refused() -> None:
    model = families.build("mae")
    with pytest.raises(UnsupportedModelError, match="it shuffles them"):
        get_features(model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "there are no images"),
        (torch.zeros(0, 3, 80, 80), "there are no images"),
        ({"a": 1}, "images must be a folder, image files"),
        (torch.zeros(3, 80, 80), r"must be \(M, 3, H, W\)"),
        ("no such folder", "neither a folder nor a file"),
    ],
)
def test_what_are_no_images_is_named(vit: Any, images: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_features(vit, images)


def test_pixel_values_of_several_sizes_are_refused(vit: Any) -> None:
    with pytest.raises(ValueError, match="several sizes"):
        get_features(vit, [torch.zeros(3, 80, 80), torch.zeros(3, 80, 72)])
