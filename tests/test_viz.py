"""Attention maps, examples and figures of real models, with and without registers; a model is left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import HEADS, PATCH, TOWERS, WIDTH, build, make_inputs
from helpers import hooks
from page_cases import make_report
from PIL import Image
from torch import nn

import register_adapter.viz as viz
from register_adapter import RegisterConfig, UnsupportedModelError, add_registers, attention_map, capture, find_tower
from register_adapter.data import ImageFileError
from register_adapter.testbed import SceneDataset, load_image_processor, load_planted_vit, load_vit
from register_adapter.viz import principal_colours, read_examples
from register_adapter.viz.colours import COLOUR_MAPS, coloured

#: MAE shuffles its patches, SigLIP 2 and Molmo 2 take patches.
PLAIN = [name for name in TOWERS if name not in ("mae", "siglip2-vision", "molmo2-vision")]


def _pixels(height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def _image(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# attention_map


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_it_is_what_the_model_attends_to(name: str, registers: int) -> None:
    model = build(name)
    model = add_registers(model, registers).eval() if registers else model
    image = make_inputs(name)["pixel_values"][0]
    tower = find_tower(model)
    with torch.no_grad(), capture(model) as trace:
        tower.run(image[None])
    first = tower.prefix + registers
    rows = trace.attentions[-1][0, :, :, first:]
    query = rows[:, 0] if tower.prefix else rows.mean(1)
    side = image.shape[-1] // PATCH
    wanted = query[:, : side**2].reshape(HEADS, side, side).numpy()
    attention = attention_map(model, image, head="all")
    assert attention.dtype == np.float32
    np.testing.assert_allclose(attention, wanted, atol=1e-6)
    np.testing.assert_allclose(attention_map(model, image), wanted.mean(0), atol=1e-6)
    np.testing.assert_allclose(attention_map(model, image, head=1), wanted[1], atol=1e-6)
    early = trace.attentions[0][0, :, 0 if tower.prefix else slice(None), first : first + side**2]
    wanted = early.reshape(HEADS, -1, side, side).mean((0, 1)).numpy()
    np.testing.assert_allclose(attention_map(model, image, block=0), wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2-registers"])
def test_it_agrees_with_transformers(name: str) -> None:
    model, image = build(name, "eager"), _pixels()
    prefix = find_tower(model).prefix
    with torch.no_grad():
        maps = model(image[None], output_attentions=True).attentions
    wanted = maps[1][0, :, 0, prefix:].reshape(HEADS, 4, 4).numpy()
    np.testing.assert_allclose(attention_map(model, image, head="all"), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["timm", "timm-registers", "timm-no-class", "eva", "open_clip", "open_clip-whole", "torchvision", "hub"]
)
@pytest.mark.parametrize("registers", [0, 2])
def test_other_libraries(name: str, registers: int) -> None:
    from stacks_cases import STACKS, build_stack, images

    model, image = build_stack(name), images(batch=1)
    model = add_registers(model, registers).eval() if registers else model
    first = STACKS[name].prefix + registers
    with torch.no_grad(), capture(model) as trace:
        find_tower(model).run(image)
    rows = trace.attentions[-1][0]
    wanted = (rows[:, 0, first:] if STACKS[name].prefix else rows[:, :, first:].mean(1)).reshape(HEADS, 4, 4)
    np.testing.assert_allclose(attention_map(model, image, head="all"), wanted.numpy(), atol=1e-6)


def test_a_token_that_is_a_register_is_no_cls() -> None:
    from stacks_cases import build_stack, images

    (example,) = read_examples(build_stack("timm-registers-only"), images(batch=1))
    (maps,) = example.maps.values()
    assert maps.query == "all tokens"
    assert len(maps.registers) == 3


@pytest.mark.parametrize("options", [{"key_value": True}, {"insert_layer": 1}, {"deep": True}, {"gate": -1.0}])
def test_registers_of_every_placement(options: dict[str, Any]) -> None:
    model = add_registers(build("vit"), 3, **options).eval()
    (example,) = read_examples({"it": model}, [_pixels()])
    maps = example.maps["it"]
    assert maps.attention.shape == (HEADS, 4, 4)
    assert len(maps.registers) == (0 if options.get("key_value") else 3)
    taken = maps.attention.sum((1, 2))
    assert (taken < 1).all()
    assert (taken > 0.2).all()
    before = attention_map(model, _pixels(), block=0)
    assert before.shape == (4, 4)


# Sizes


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 41), (17, 8), (39, 39)])
def test_sides_are_cropped_to_a_multiple_of_the_patch_size(height: int, width: int) -> None:
    model, image = build("dinov2"), _pixels(height, width)
    rows, columns = height // PATCH, width // PATCH
    attention = attention_map(model, image)
    assert attention.shape == (rows, columns)
    np.testing.assert_array_equal(attention, attention_map(model, image[:, : rows * PATCH, : columns * PATCH]))


def test_an_image_of_230_by_245_has_16_by_17_patches_of_14_pixels() -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    image = _image(230, 245)
    attention = attention_map(model, image, image_processor=load_image_processor(), size=230)
    assert attention.shape == (16, 17)
    (example,) = read_examples(model, [image], image_processor=load_image_processor(), size=230)
    np.testing.assert_array_equal(example.image, np.asarray(image)[:224, :238])
    figure = viz.plot_attention(example, overlay=True)
    for axis in figure.axes:
        for shown in axis.get_images():
            assert list(shown.get_extent()) in ([0, 238, 224, 0], [-0.5, 237.5, 223.5, -0.5])


@pytest.mark.parametrize(("size", "wanted"), [(None, (4, 4)), (48, (6, 12)), ((40, 24), (5, 3))])
def test_sizes_of_images(size: Any, wanted: tuple[int, int]) -> None:
    """The processor's own size, the shorter side, or both sides."""
    processor = type(load_image_processor())(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=True
    )
    image = _image(60, 120)
    assert attention_map(build("vit"), image, image_processor=processor, size=size).shape == wanted
    (example,) = read_examples(build("vit"), [image], image_processor=processor, size=size)
    assert example.image.shape == (wanted[0] * PATCH, wanted[1] * PATCH, 3)


def test_a_torchvision_transform_is_a_processor() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    transform, image, model = transforms.Compose(steps), _image(60, 120), build("vit")
    attention = attention_map(model, image, image_processor=transform)
    np.testing.assert_array_equal(attention, attention_map(model, transform(image)))
    assert attention_map(model, image, image_processor=transform, size=48).shape == (6, 12)


@pytest.mark.parametrize("name", ["timm", "open_clip", "open_clip-whole"])
def test_models_that_say_how_their_images_are_prepared(name: str, tmp_path: Any) -> None:
    from stacks_cases import build_stack

    _image(60, 80).save(tmp_path / "image.png")
    model = build_stack(name)
    attention = attention_map(model, tmp_path / "image.png")
    assert attention.shape == (4, 4)
    (example,) = read_examples(model, [tmp_path / "image.png"])
    assert example.name == "image.png"
    assert example.image.shape == (32, 32, 3)


def test_a_model_of_a_name_takes_its_own_processor() -> None:
    image = SceneDataset(1, size=120, seed=3, split=None)[0]["image"]
    wanted = attention_map(load_vit(), image, image_processor=load_image_processor())
    np.testing.assert_allclose(attention_map(load_vit(), image), wanted, rtol=1e-4)  # torchvision resizes elsewise
    assert wanted.shape == (10, 10)


def test_patches_that_the_processor_cuts() -> None:
    """SigLIP 2: the grid is the image's own, and padding is no patch."""
    if "siglip2-vision" not in TOWERS:
        pytest.skip("this transformers has no SigLIP 2")
    model = build("siglip2-vision")

    class Processor:
        def preprocess(self) -> None: ...

        def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(0)
            return {
                "pixel_values": torch.randn(1, 16, 3 * PATCH**2, generator=generator),
                "pixel_attention_mask": (torch.arange(16) < 15)[None].long(),
                "spatial_shapes": torch.tensor([[3, 5]]),
            }

    (example,) = read_examples({"it": model}, [_image(30, 50)], image_processor=Processor())
    assert example.maps["it"].attention.shape == (HEADS, 3, 5)
    np.testing.assert_allclose(example.maps["it"].attention.sum((1, 2)), 1, atol=1e-5)


# What is wrong


@pytest.mark.parametrize(
    ("name", "image", "options", "kind", "words"),
    [
        ("vit", _pixels(), {"block": 2}, ValueError, "2 blocks"),
        ("vit", _pixels(), {"head": 4}, ValueError, "4 heads"),
        ("vit", _pixels()[0], {}, viz.ImageInputError, r"\(32, 32\)"),
        ("vit", _pixels().byte(), {}, viz.ImageInputError, "uint8"),
        ("vit", _pixels(4, 32), {}, viz.ImageInputError, "no patch of 8"),
        ("vit", "nowhere.png", {}, ImageFileError, "nowhere.png"),
        ("vit", _image(9, 9), {}, viz.ImageInputError, "image_processor="),
        ("mae", _pixels(), {}, UnsupportedModelError, "shuffles"),
    ],
)
def test_errors_name_what_was_wrong(name: str, image: Any, options: dict[str, Any], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        attention_map(build(name), image, **options)


def test_a_model_of_one_size_only_says_so() -> None:
    from stacks_cases import build_stack

    with pytest.raises(viz.ImageInputError, match="dynamic_img_size"):
        attention_map(build_stack("timm"), _pixels(48, 48))
    with pytest.raises(ValueError, match="images is empty"):
        read_examples(build("vit"), [])
    with pytest.raises(ValueError, match="no adapter 'b'"):
        read_examples({"b": (add_registers(build("vit"), 2), "b")}, [_pixels()])
    with pytest.raises(ValueError, match="is not a PeftModel"):
        read_examples({"b": (build("vit"), "b")}, [_pixels()])
    with pytest.raises(ValueError, match="no adapters to disable: give the model alone"):
        read_examples({"b": (build("vit"), None)}, [_pixels()])


# A model is left as it was


class _State:
    """What of a model looking at it could change."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, self._now(model)

    @staticmethod
    def _now(model: nn.Module) -> dict[str, Any]:
        config = find_tower(model).config
        return {
            "hooks": hooks(model),
            "training": {name: module.training for name, module in model.named_modules()},
            "gradients": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "attention": getattr(config, "_attn_implementation", None),
            "adapters": list(getattr(model, "active_adapters", [])),
            "values": {name: value.clone() for name, value in model.state_dict().items()},
        }

    def check(self) -> None:
        after = self._now(self.model)
        values, before = after.pop("values"), dict(self.before)
        assert all(torch.equal(values[name], value) for name, value in before.pop("values").items())
        assert after == before


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(fails: bool) -> None:
    model = add_registers(build("vit", "sdpa"), 2)
    model.add_adapter("b", RegisterConfig(num_registers=3))
    model.train()
    model.base_model.model.eval()  # a mixture of modes
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 == 0)  # and of what PEFT would freeze and free
    state = _State(model)
    if fails:
        with pytest.raises(viz.ImageInputError):
            read_examples(model, [_pixels()[:2]])
    else:
        read_examples(model, [_pixels(), _pixels(40, 24)])
        attention_map(model, _pixels())
    state.check()


def test_an_exception_inside_the_forward_leaves_nothing_behind() -> None:
    model = add_registers(build("dinov2", "sdpa"), 2)
    state = _State(model)

    def fail(*_: Any) -> None:
        raise KeyError("a hook of somebody else's")

    handle = find_tower(model).part("blocks")[1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="somebody"):
        read_examples({"a": (model, "default"), "base": (model, None)}, [_pixels(16, 16)])
    handle.remove()
    state.check()


# Several models and adapters


def test_adapters_are_read_one_by_one() -> None:
    model = add_registers(build("vit"), 2)
    model.add_adapter("b", RegisterConfig(num_registers=3))
    model.eval()
    state = _State(model)
    examples = read_examples(model, [_pixels(seed=1), _pixels(seed=2)])
    state.check()
    assert [list(example.maps) for example in examples] == [["base", "+ default", "+ b"]] * 2
    alone = {
        "base": read_examples({"x": build("vit")}, [_pixels(seed=1)])[0].maps["x"],
        "+ default": read_examples({"x": model}, [_pixels(seed=1)])[0].maps["x"],
    }
    model.set_adapter("b")
    alone["+ b"] = read_examples({"x": model}, [_pixels(seed=1)])[0].maps["x"]
    for name, wanted in alone.items():
        drawn = examples[0].maps[name]
        np.testing.assert_array_equal(drawn.attention, wanted.attention)
        np.testing.assert_array_equal(drawn.norms, wanted.norms)
        np.testing.assert_array_equal(drawn.registers, wanted.registers)
    assert [len(maps.registers) for maps in examples[0].maps.values()] == [0, 2, 3]


def test_registers_come_with_their_names() -> None:
    model = add_registers(build("dinov2-registers"), 2).eval()
    (example,) = read_examples({"it": model}, [_pixels()])
    maps = example.maps["it"]
    assert len(maps.registers) == len(maps.register_names) == 5
    assert ["native" in name for name in maps.register_names] == [True] * 3 + [False] * 2
    with torch.no_grad(), capture(model) as trace:
        model(_pixels()[None])
    wanted = trace.attentions[-1][0, :, 1:6, 6:].mean(0).reshape(5, 4, 4).numpy()
    np.testing.assert_allclose(maps.registers, wanted, atol=1e-6)


def test_norm_maps_stand_before_the_final_norm_and_show_planted_artifacts() -> None:
    planting = load_planted_vit()
    data = SceneDataset(4, seed=10_001, split=None)
    images = [data[index]["image"] for index in range(4)]
    models = {"planted": planting.model, "twin": load_vit()}
    examples = read_examples(models, images, image_processor=load_image_processor())
    pixels = load_image_processor()(images=images, return_tensors="pt")["pixel_values"]
    hits = planting.hits(pixels).reshape(4, 10, 10).numpy()
    assert hits.any()
    for example, hit in zip(examples, hits, strict=True):
        norms = {name: maps.norms[-1] for name, maps in example.maps.items()}
        np.testing.assert_array_equal(norms["planted"] > 3 * np.median(norms["planted"]), hit)
        assert norms["twin"].max() < 3 * np.median(norms["twin"])
        assert len(example.maps["planted"].norms) == 9
        before = slice(0, planting.block + 1)
        np.testing.assert_allclose(example.maps["planted"].norms[before], example.maps["twin"].norms[before], rtol=1e-4)


# Colours


def test_principal_components_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(5, 0.5, 12)
    features = [torch.randn(count, 12, generator=generator) * scale for count in (20, 30)]
    colours = principal_colours(features, [(4, 5), (6, 5)])
    assert [image.shape for image in colours] == [(4, 5, 3), (6, 5, 3)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in colours])
    scores = decomposition.PCA(3).fit_transform(torch.cat(features).numpy())
    inside = (pixels > 0) & (pixels < 1)
    for channel in range(3):
        kept = inside[:, channel]
        assert kept.sum() > 40
        assert abs(np.corrcoef(pixels[kept, channel], scores[kept, channel])[0, 1]) > 0.9999
        assert 0 < (pixels[:, channel] == 0).sum() <= 2
        assert 0 < (pixels[:, channel] == 1).sum() <= 2


def test_colours_repeat_and_follow_those_of_another_model() -> None:
    features = [torch.randn(16, 8, generator=torch.Generator().manual_seed(0))]
    first = principal_colours(features, [(4, 4)])
    np.testing.assert_array_equal(first[0], principal_colours(features, [(4, 4)])[0])
    mirrored = principal_colours([-features[0]], [(4, 4)], like=first)
    np.testing.assert_allclose(mirrored[0], first[0], atol=1e-6)
    turned = principal_colours([features[0] * torch.tensor([1.0, 1, 1, 1, 1, 1, 1, -1])], [(4, 4)], like=first)
    np.testing.assert_allclose(turned[0], first[0], atol=1e-5)
    # The same three directions in another order of their variance.
    shapes = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    shapes = torch.linalg.qr(shapes - shapes.mean(0))[0]
    falling, rising = (
        principal_colours([shapes * torch.tensor(s)], [(4, 4)])[0] for s in ((3.0, 2.0, 1.0), (1.0, 2.0, 3.0))
    )
    assert np.abs(falling - rising).mean() > 0.1
    (followed,) = principal_colours([shapes * torch.tensor([1.0, 2.0, 3.0])], [(4, 4)], like=[falling])
    np.testing.assert_allclose(followed, falling, atol=1e-5)
    few = principal_colours([torch.randn(2, 8)], [(1, 2)])
    assert np.isfinite(few[0]).all()


def test_features_are_behind_the_final_norm_where_the_models_patches_are() -> None:
    (example,) = read_examples({"vit": build("vit"), "clip": build("clip-vision")}, [_pixels()])
    with torch.no_grad():
        wanted = build("vit")(_pixels()[None]).last_hidden_state[0, 1:]
    torch.testing.assert_close(example.maps["vit"].features, wanted)
    assert example.maps["vit"].features.shape == (16, WIDTH)
    assert [maps.normed for maps in example.maps.values()] == [True, False]
    (inside,) = read_examples({"vit": build("vit")}, [_pixels()], block=0)
    assert not inside.maps["vit"].normed


@pytest.mark.parametrize("name", COLOUR_MAPS)
def test_colour_maps_are_matplotlibs(name: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    values = np.linspace(0, 1, 200)[None]
    wanted = matplotlib.colormaps[name](values)[..., :3] * 255
    assert np.abs(coloured(values, name).astype(float) - wanted).max() < 8
    assert coloured([[0.0, float("nan")]], name).shape == (1, 2, 3)


# Figures


@pytest.fixture(scope="module")
def examples() -> list[viz.Example]:
    model = add_registers(build("vit"), 2).eval()
    return read_examples({"base": (model, None), "registers": (model, "default")}, [_pixels(), _pixels(seed=1)])


def _images(figure: Any) -> list[Any]:
    return [shown for axis in figure.axes for shown in axis.get_images()]


@pytest.mark.parametrize(
    ("draw", "count"),
    [
        (lambda all_: viz.plot_attention(all_[0]), 2 * (2 + HEADS)),
        (lambda all_: viz.plot_attention(all_[0], overlay=True), 2 * (1 + 2 * (1 + HEADS))),
        (lambda all_: viz.plot_norm_maps(all_[0]), 2 * 4),
        (lambda all_: viz.plot_norm_maps(all_[0], layers=[-1]), 2 * 2),
        (lambda all_: viz.plot_pca(all_), 2 * 3),
        (lambda all_: viz.plot_registers(all_[0]), 2 + 1 + 3),
        (lambda all_: viz.plot_norm_histograms(make_report()), 0),
        (lambda all_: viz.plot_norm_histograms([make_report(), make_report("twin", first=None)], layers=[0, 4]), 0),
    ],
)
def test_figures(examples: list[viz.Example], draw: Any, count: int, tmp_path: Any) -> None:
    from matplotlib.figure import Figure

    figure = draw(examples)
    assert isinstance(figure, Figure)
    assert figure.canvas.manager is None  # pyplot knows nothing of it
    assert len(_images(figure)) == count
    figure.savefig(tmp_path / "figure.png", dpi=40)
    with Image.open(tmp_path / "figure.png") as drawn:
        assert len(drawn.convert("L").getcolors(10_000)) > 20


def test_figures_show_the_maps_on_one_scale(examples: list[viz.Example], tmp_path: Any) -> None:
    figure = viz.plot_norm_maps(examples[0], layers=[1], path=tmp_path / "norms.png")
    shown = [axis.get_images()[0] for axis in figure.axes if axis.get_title()]
    maps = [model_maps.norms[1] for model_maps in examples[0].maps.values()]
    assert len({artist.get_clim() for artist in shown}) == 1
    assert shown[0].get_clim() == (0, pytest.approx(max(norms.max() for norms in maps)))
    for artist, wanted in zip(shown, maps, strict=True):
        np.testing.assert_array_equal(artist.get_array(), wanted)
    assert (tmp_path / "norms.png").stat().st_size > 1000


def test_histograms_draw_cuts_and_counts() -> None:
    figure = viz.plot_norm_histograms(make_report(layers=3, first=2))
    drawn = [axis for axis in figure.axes if axis.get_visible()]
    assert [len(axis.lines) for axis in drawn] == [0, 0, 1]
    report = make_report(layers=3, first=2)
    assert drawn[2].lines[0].get_xdata()[0] == report.layers[2].threshold.high
    assert drawn[0].patches[0].get_data().values.sum() == report.layers[0].norms["patch"].count


def test_maps_before_and_after() -> None:
    model, pixels = build("vit"), torch.stack([_pixels(), _pixels(seed=1)])
    maps = viz.read_maps("it", model, pixels)
    examples = read_examples({"it": model}, pixels)
    np.testing.assert_array_equal(maps.norms[1], examples[1].maps["it"].norms[-1])
    np.testing.assert_array_equal(maps.attention[0], attention_map(model, pixels[0]))
    figure = viz.plot_before_after([example.image for example in examples], [maps])
    assert len(_images(figure)) == 6
