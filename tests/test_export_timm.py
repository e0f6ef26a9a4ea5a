"""The native export of timm models: what comes out is what ``timm.create_model(..., reg_tokens=...)`` makes."""

import inspect
import json

import pytest
import torch
import transformers
from families import perturb
from helpers import assert_identical, flatten, hooks
from processes import run_script
from stacks_cases import build_stack
from test_export import perturb_registers

from register_adapter import (
    UnsupportedModelError,
    add_registers,
    export_native,
    export_onnx,
    export_program,
    save_native,
)
from register_adapter.export.saved import export_saved
from register_adapter.tuner.hooks.tokens import cut_tokens

timm = pytest.importorskip("timm")
VisionTransformer = timm.models.vision_transformer.VisionTransformer

#: Whether timm's factory keeps CLS and registers in a model without position embeddings, and reads safetensors from a
#: folder; before 1.0.26 it does neither.
KEEPS_PREFIX = "to_cat" in inspect.getsource(VisionTransformer._pos_embed).partition("self.pos_embed is None")[0]
READS_FOLDER = "torch.load" not in inspect.getsource(timm.models._hub.load_state_dict_from_path)

R = 3
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
VIT, EVA, DINOV3 = "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3"
#: Name -> model of timm, its arguments beside SHAPE, argument for the number of registers.
MODELS = {
    "vit": (VIT, {}, "reg_tokens"),
    "no position for CLS": (VIT, {"no_embed_class": True}, "reg_tokens"),
    "registers": (VIT, {"reg_tokens": 2}, "reg_tokens"),
    "registers, no position": (VIT, {"reg_tokens": 2, "no_embed_class": True}, "reg_tokens"),
    "no CLS": (VIT, {"class_token": False, "global_pool": "avg"}, "reg_tokens"),
    "no CLS, map": (VIT, {"class_token": False, "global_pool": "map"}, "reg_tokens"),
    "map": (VIT, {"global_pool": "map"}, "reg_tokens"),
    "avg": (VIT, {"global_pool": "avg"}, "reg_tokens"),
    "avgmax": (VIT, {"global_pool": "avgmax"}, "reg_tokens"),
    "max": (VIT, {"global_pool": "max"}, "reg_tokens"),
    "no pool": (VIT, {"global_pool": ""}, "reg_tokens"),
    "dynamic": (VIT, {"dynamic_img_size": True}, "reg_tokens"),
    "no position": (VIT, {"pos_embed": "none"}, "reg_tokens"),
    "patch drop": (VIT, {"patch_drop_rate": 0.25}, "reg_tokens"),
    "eva": (EVA, {}, "num_reg_tokens"),
    "eva, dynamic": (EVA, {"dynamic_img_size": True, "patch_drop_rate": 0.25}, "num_reg_tokens"),
    "eva, token": (EVA, {"global_pool": "token"}, "num_reg_tokens"),
    "dinov3": (DINOV3, {}, "num_reg_tokens"),
}


def make(name, **options):
    architecture, arguments, _ = MODELS[name]
    model = timm.create_model(architecture, **SHAPE, **arguments, **options)
    perturb(model)
    return model.eval().requires_grad_(False)


STRANGERS = ["vit", "registers", "no CLS, map", "eva", "dinov3"]


def adapted(name, **options):
    model = add_registers(make(name, **options), R).eval()
    perturb_registers(model)
    return model


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def settings(model):
    """The plain attributes of every module."""
    kinds = (bool, int, float, str, tuple, type(None))
    return {
        path: {key: value for key, value in vars(module).items() if isinstance(value, kinds)}
        for path, module in model.named_modules()
    }


def calls(model, x, cut=lambda hidden: hidden):
    """What users of timm call; ``cut`` takes the registers out of a whole sequence."""
    with torch.no_grad():
        features = model.forward_features(x)
        last, maps = model.forward_intermediates(x)
        results = {
            "logits": model(x) if model.global_pool else cut(model(x)),
            "features": cut(features),
            "pooled": model.forward_head(features, pre_logits=True) if model.global_pool else cut(features),
            "last": cut(last),
            "maps": maps,
            "normed": model.forward_intermediates(x, norm=True, intermediates_only=True, output_fmt="NLC"),
        }
        if hasattr(model, "get_intermediate_layers"):
            results["layers"] = model.get_intermediate_layers(x, n=2, reshape=True)
    return flatten(results)


@pytest.mark.parametrize("name", MODELS)
def test_the_export_is_what_timm_makes_and_exact(name):
    model, x = adapted(name), images()
    base, registers = model.get_base_model(), MODELS[name][2]
    state = {key: value.clone() for key, value in base.state_dict().items()}
    prefix = base.num_prefix_tokens
    expected = calls(base, x)
    if name == "no position" and not KEEPS_PREFIX:
        with pytest.raises(UnsupportedModelError, match="differs by"):
            export_native(model)
        return
    plain = export_native(model)
    # The very model of the factory: weights, settings, nothing of ours.
    count = plain.reg_token.shape[1]
    again = timm.create_model(MODELS[name][0], **{**SHAPE, **MODELS[name][1], registers: count}).eval()
    again.load_state_dict(plain.state_dict(), strict=True)
    assert settings(plain) == settings(again)
    assert vars(plain).keys() == vars(again).keys()
    assert hooks(plain) == {}
    for exported in (plain, again):
        exported.requires_grad_(False)  # as the base is: older torch rounds otherwise where a weight wants a gradient
        results = calls(exported, x, lambda hidden: cut_tokens(hidden, prefix, R, hidden.shape[1]))
        assert_identical(results, expected)
    # The base is as it was.
    assert all(torch.equal(base.state_dict()[key], value) for key, value in state.items())
    assert_identical(calls(base, x), expected)


@pytest.mark.parametrize("name", ["dynamic", "eva, dynamic"])
def test_it_is_exact_at_another_size_too(name):
    model, x = adapted(name), images(48)
    with torch.no_grad():
        assert torch.equal(export_native(model)(x), model(x))
    with pytest.raises(ValueError, match="a timm model is exact at every size"):
        export_native(model, image_size=48)


def test_features_only_gives_the_same_maps():
    model, x = adapted("registers", features_only=True, out_indices=[0, 1]), images()
    plain = export_native(model)
    with torch.no_grad():
        maps, expected = plain(x), model(x)
    assert len(maps) == 2
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(maps, expected, strict=True))
    assert plain.model.reg_token.shape[1] == 2 + R


def test_a_trained_head_goes_in():
    model, x = add_registers(make("vit"), R, modules_to_save=["head"]).eval(), images()
    perturb(model.get_base_model().head.modules_to_save["default"], seed=3)
    perturb_registers(model)
    plain = export_native(model)
    assert type(plain.head) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (VIT, {"pre_norm": True}, "pre_norm"),
        (VIT, {"global_pool": "map", "pool_include_prefix": True}, "differs by"),
        (EVA, {"global_pool": "map"}, "differs by"),
        ("deit_tiny_distilled_patch16_224", {}, "has no reg_tokens"),
    ],
)
def test_a_model_without_an_equivalent_is_refused(architecture, options, message):
    base = timm.create_model(architecture, **SHAPE, **options)
    perturb(base)
    model = add_registers(base, R).eval()
    perturb_registers(model)
    with pytest.raises(UnsupportedModelError, match=rf"(?s){message}.*export_onnx"):
        export_native(model)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """What a process says, by way, of every model that it made with timm."""
    root = tmp_path_factory.mktemp("strangers")
    for name in STRANGERS:
        folder = root / name
        model, x = adapted(name), images()
        plain = export_native(model)
        remembered = hasattr(plain, "_model_args")  # by recent releases of timm
        save_native(plain, folder / "plain", None if remembered else {**SHAPE, **MODELS[name][1]})
        with torch.no_grad():
            torch.save({"x": x, "logits": model(x)}, folder / "expected.pt")
    ways = "folder,file" if READS_FOLDER else "file"
    return json.loads(run_script("stranger_makes_timm", ways, *STRANGERS, cwd=root).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["folder", "file"])
@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_makes_it_with_timm(name, way, strangers):
    if way not in strangers:
        pytest.skip("this timm unpickles whatever lies in a folder, safetensors too; its checkpoint_path= reads them")
    assert strangers[way][name] is True


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda model: model.pretrained_cfg.pop("architecture"), {}, "has no name there"),
        (lambda model: model.__dict__.pop("_model_args", None), {"depth": 3}, r"weights differ.*model_args"),
        (lambda model: None, {"no_such": 1}, "no_such"),
    ],
)
def test_what_timm_cannot_make_again_is_not_saved(change, arguments, message, tmp_path):
    plain = export_native(adapted("vit"))
    change(plain)
    with pytest.raises(ValueError, match=message):
        save_native(plain, tmp_path / "plain", arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_graphs(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, x = adapted("dinov3"), images()[:1]
    export_program(model, tmp_path / "model.pt2")
    export_onnx(model, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = model(x)
    program = torch.export.load(tmp_path / "model.pt2").module()
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    torch.testing.assert_close(program(x=x)["output"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(session.run(["output"], {"x": x.numpy()})[0]), expected, atol=1e-4, rtol=1e-4
    )


def test_a_saved_adapter_at_a_size_that_the_model_does_not_take(tmp_path):
    base = build_stack("timm-wrapper")
    base.save_pretrained(tmp_path / "base")
    add_registers(base, 2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"cannot be run at image_size=48: .*48"):
        export_saved(tmp_path / "adapter", tmp_path / "out", "program", str(tmp_path / "base"), 48)


def test_an_export_of_transformers_wrapper_loads(tmp_path):
    model, x = add_registers(build_stack("timm-wrapper"), 2), images()
    save_native(export_native(model), tmp_path / "plain")
    plain = transformers.TimmWrapperModel.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        hidden, expected = (each(pixel_values=x).last_hidden_state for each in (plain, model))
    assert torch.equal(cut_tokens(hidden, 1, 2, hidden.shape[1]), expected)


@pytest.mark.parametrize("names", [{0: "cat", 1: "dog", 2: "cup"}, {0: "cat", 1: "dog"}])
def test_an_export_of_transformers_wrapper_has_the_trained_heads_classes(names, tmp_path):
    base, x = build_stack("timm-wrapper-classifier"), images()
    base.config.label_names = list(base.config.id2label.values())  # as a checkpoint of timm's has them
    base.save_pretrained(tmp_path / "base")
    base.timm_model.reset_classifier(len(names))
    model = add_registers(base, 2, modules_to_save=["timm_model.head"], id2label=names)
    model.save_pretrained(tmp_path / "adapter")
    export_saved(tmp_path / "adapter", tmp_path / "plain", "native", str(tmp_path / "base"))
    plain = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / "plain")
    assert plain.config.id2label == names
    with torch.no_grad():
        assert torch.equal(plain(pixel_values=x).logits, model.eval()(pixel_values=x).logits)
