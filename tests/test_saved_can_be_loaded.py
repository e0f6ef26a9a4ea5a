"""What a save of registers, or offsets, writes can be loaded again: any float, and none of the base's embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import CASES, build, make_inputs
from helpers import assert_identical, run
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from register_adapter import PositionConfig, RegisterConfig, add_registers, compose, find_register_layer, load_adapters
from register_adapter.errors import AdapterFileError
from register_adapter.tuner.positions import position_layers
from register_adapter.utils.adapter_file import read_header


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base on disk whose users resize its vocabulary once they have it."""
    folder = tmp_path_factory.mktemp("resized")
    build("git").save_pretrained(folder)
    return folder


def with_more_words(folder: Path) -> Any:
    model: Any = tf.GitForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return model


def by_transformers(base: Any) -> Any:
    base.add_adapter(RegisterConfig(num_registers=2))
    return base


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "own": lambda base: add_registers(base, 2),
    "PEFT": lambda base: get_peft_model(base, RegisterConfig(num_registers=2)),
    "PEFT's class": lambda base: PeftModel(base, RegisterConfig(num_registers=2)),
    "transformers": by_transformers,
}


@pytest.mark.filterwarnings("ignore:.*drawn at random")
@pytest.mark.parametrize("holder", HOLDERS)
def test_without_resized_embeddings(holder: str, resized: Path, tmp_path: Path) -> None:
    HOLDERS[holder](with_more_words(resized)).save_pretrained(tmp_path)
    assert [key.rpartition("registers.")[2] for key in read_header(tmp_path / "adapter_model.safetensors")] == [
        "register_adapter_tokens.weight"
    ]
    PeftModel.from_pretrained(with_more_words(resized), tmp_path)


@pytest.mark.parametrize("holder", [name for name in HOLDERS if name != "transformers"])
def test_embedding_layers_are_refused(holder: str, tmp_path: Path) -> None:
    model = HOLDERS[holder](build("vit"))
    with pytest.raises(ValueError, match="save_embedding_layers=True is not offered for registers"):
        model.save_pretrained(tmp_path / "out", save_embedding_layers=True)
    assert not list(tmp_path.glob("out/adapter_*"))
    with pytest.raises(ValueError, match="save_embedding_layers=True is not offered for registers"):
        get_peft_model_state_dict(model, save_embedding_layers=True)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "composed"])
@pytest.mark.parametrize("options", [{}, {"key_value": True, "gate": -1.0}], ids=["tokens", "gate"])
def test_of_double_precision(options: dict[str, Any], together: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RegisterConfig(init_std=1.0, **options)
    base = build("vit", dtype=torch.float64)
    model: Any = compose(base, {"default": config}) if together else get_peft_model(base, config)
    model.eval().save_pretrained(tmp_path)
    inputs = {key: value.double() for key, value in make_inputs("vit").items()}
    load: Any = load_adapters if together else PeftModel.from_pretrained
    loaded = load(build("vit", dtype=torch.float64), tmp_path).eval()
    assert_identical(run(loaded, inputs), run(model, inputs))
    single = load(build("vit"), tmp_path).eval()
    expected = {key: value.float() for key, value in run(model, inputs).items()}
    torch.testing.assert_close(run(single, make_inputs("vit")), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("together", [False, True], ids=["alone", "composed"])
def test_a_quantised_head_is_refused_by_name(together: bool, tmp_path: Path) -> None:
    config, base = RegisterConfig(modules_to_save=["classifier"]), build("vit-classifier")
    model: Any = compose(base, {"default": config}) if together else get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    written = sorted(path.name for path in tmp_path.rglob("*"))
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"classifier.*( is of a quantised module|_packed_params)"):
        quantised.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == written


class WithBuffer(torch.nn.Linear):
    """A head with something else in its state, a mask or an index."""

    def __init__(self, dtype: torch.dtype, persistent: bool = True) -> None:
        super().__init__(32, 5)
        self.register_buffer("mask", torch.ones(5, dtype=dtype), persistent)


def with_head(head: torch.nn.Module | None) -> Any:
    base = build("vit-classifier")
    base.classifier = head or torch.nn.Linear(32, 5)
    return base


OWN: dict[str, Callable[[Any], Any]] = {
    "registers": lambda base: get_peft_model(base, RegisterConfig(modules_to_save=["classifier"])),
    "offsets": lambda base: get_peft_model(base, PositionConfig(modules_to_save=["classifier"])),
    "composed": lambda base: compose(base, {"default": RegisterConfig(modules_to_save=["classifier"])}),
    "composed LoRA": lambda base: compose(
        base, {"default": LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"])}
    ),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64], ids=str)
@pytest.mark.parametrize("way", OWN)
def test_a_head_of_a_dtype_that_no_file_may_have(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What a loader refuses is found before anything is trained, and is not written where it comes afterwards."""
    if way == "composed LoRA" and dtype == torch.int32:
        pytest.skip("other methods have indices")
    base = with_head(WithBuffer(dtype))
    with pytest.raises(ValueError, match=f"names 'classifier', whose 'mask' has dtype {dtype}.*persistent=False"):
        OWN[way](base)
    model = OWN[way](with_head(None))
    model.save_pretrained(tmp_path)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    copy = model.get_base_model().classifier.modules_to_save["default"]
    copy.register_buffer("mask", torch.ones(5, dtype=dtype))
    with pytest.raises(ValueError, match=f"'default' is not saved.*mask has dtype {dtype}.*persistent=False"):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written
    model = OWN[way](with_head(WithBuffer(dtype, persistent=False))).eval()
    model.save_pretrained(tmp_path / "way out")
    load: Any = load_adapters if "composed" in way else PeftModel.from_pretrained
    loaded = load(with_head(WithBuffer(dtype, persistent=False)), tmp_path / "way out").eval()
    assert_identical(run(loaded, make_inputs("vit-classifier")), run(model, make_inputs("vit-classifier")))


@pytest.mark.parametrize("way", ["registers", "offsets"])
def test_float_weights_are_not_put_into_a_head_of_integers(way: str, tmp_path: Path) -> None:
    """As a base has that was quantised by hand, head and all: each weight would become a whole number."""
    OWN[way](with_head(None)).save_pretrained(tmp_path)
    base = with_head(None)
    base.classifier.weight = torch.nn.Parameter(torch.ones(5, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterFileError, match=r"has dtype torch\.float32, the model's"):
        PeftModel.from_pretrained(base, tmp_path)
    assert base.classifier.weight.eq(1).all()
    assert type(base.classifier) is torch.nn.Linear


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("way", ["registers", "offsets"])
def test_a_base_whose_head_is_quantised_is_refused_by_name(way: str, tmp_path: Path) -> None:
    OWN[way](with_head(None)).save_pretrained(tmp_path)
    base = torch.ao.quantization.quantize_dynamic(with_head(None), {"classifier"}, dtype=torch.qint8)
    head = base.classifier
    with pytest.raises(AdapterFileError, match=r"the model's classifier\.\S+ is .*quantise the rest of the model then"):
        PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match=r"names 'classifier', whose '\S+' is .*Quantise a model without"):
        OWN[way](base)
    assert base.classifier is head


@pytest.mark.parametrize("holder", ["own", "PEFT", "transformers", "composed", "composed LoRA"])
def test_a_head_that_was_replaced_with_its_copies_is_refused_by_name(holder: str, tmp_path: Path) -> None:
    """As by timm's ``reset_classifier``: of what the adapter was to train as a whole nothing would be in the file."""
    base: Any = build("vit-classifier")
    config: Any = RegisterConfig(num_registers=2, modules_to_save=["classifier"])
    if holder == "composed LoRA":
        config = LoraConfig(target_modules=["q_proj", "query"], modules_to_save=["classifier"])
    if holder == "own":
        model: Any = add_registers(base, 2, modules_to_save=["classifier"])
    elif holder == "transformers":
        base.add_adapter(config)
        model = base
    else:
        model = compose(base, {"default": config}) if holder != "PEFT" else get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wrapped = base.classifier
    base.classifier = torch.nn.Linear(wrapped.original_module.in_features, 7)
    with pytest.raises(ValueError, match=r"'classifier' was replaced after the adapter 'default' was put on the model"):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == written
    new, base.classifier = base.classifier, wrapped
    wrapped.modules_to_save["default"] = new
    model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("holder", ["own", "transformers", "composed"])
@pytest.mark.parametrize("way", ["none", "deleted"])
def test_a_head_that_was_taken_out_is_refused_by_name(holder: str, way: str, tmp_path: Path) -> None:
    base: Any = build("vit-classifier")
    config = RegisterConfig(num_registers=2, modules_to_save=["classifier"])
    if holder == "transformers":
        base.add_adapter(config)
    model: Any = base
    if holder != "transformers":
        model = get_peft_model(base, config) if holder == "own" else compose(base, {"default": config})
    wrapped = base.classifier
    if way == "none":
        base.classifier = None
    else:
        del base.classifier
    with pytest.raises(
        ValueError, match=r"'classifier' was taken out after the adapter 'default' was put on the model"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    base.classifier = wrapped
    model.save_pretrained(tmp_path)
    assert list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["classifier", "embeddings.dropout"])
@pytest.mark.parametrize("holder", ["PEFT", "transformers"])
def test_a_module_without_parameters_is_no_head(holder: str, name: str) -> None:
    """Nothing of it would be in the file, where every loader misses it."""
    model = build("vit-classifier")
    model.classifier = torch.nn.Identity()
    before = list(model.state_dict())
    config = RegisterConfig(num_registers=2, modules_to_save=[name])
    with pytest.raises(ValueError, match=f"modules_to_save names '{name}', .* without parameters"):
        model.add_adapter(config) if holder == "transformers" else get_peft_model(model, config)
    assert list(model.state_dict()) == before


#: What is trained on the model for depth, whose head holds a module of the same name.
WITH_A_HEAD: dict[str, Callable[[Any, list[str]], Any]] = {
    "registers": lambda base, heads: add_registers(base, 2, modules_to_save=heads),
    "positions": lambda base, heads: get_peft_model(base, PositionConfig(modules_to_save=heads)),
    "composed": lambda base, heads: compose(
        base, {"l": LoraConfig(target_modules=["query", "q_proj"], modules_to_save=heads), "r": RegisterConfig()}
    ),
}


@pytest.mark.parametrize("way", WITH_A_HEAD)
def test_a_head_inside_of_one_of_the_same_name(way: str, tmp_path: Path) -> None:
    """PEFT copies both, and finds one of them in its file."""
    base = build("depth")
    before = list(base.state_dict())
    with pytest.raises(ValueError, match=r"copy \['head.head'\] too.* Name \['head.head'\] instead"):
        WITH_A_HEAD[way](base, ["head"])
    assert list(base.state_dict()) == before
    model = WITH_A_HEAD[way](base, ["head.head"]).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value += 0.1
    model.save_pretrained(tmp_path)
    load: Any = load_adapters if way == "composed" else PeftModel.from_pretrained
    loaded = load(build("depth"), tmp_path).eval()
    assert_identical(run(loaded, make_inputs("depth")), run(model, make_inputs("depth")))


@pytest.mark.parametrize(
    ("names", "advice"),
    [(["head"], "Name ['head', 'auxiliary_head'] instead"), (["1"], "'more.1'] instead"), (["more.1"], None)],
)
def test_modules_whose_names_only_end_so(names: list[str], advice: str | None) -> None:
    """PEFT copies them too, and registers' loaders look for the module that is called so."""
    base = build("vit")
    base.head, base.auxiliary_head, base.fc1 = (torch.nn.Linear(2, 2) for _ in range(3))
    base.more = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    if advice is None:
        add_registers(base, 2, modules_to_save=names)
        return
    with pytest.raises(ValueError, match=re.escape(advice)):
        add_registers(base, 2, modules_to_save=names)


@pytest.mark.skipif(
    "dinov3" not in CASES or not hasattr(build("dinov3"), "model"), reason="no model whose blocks are called so"
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "composed"])
def test_modules_that_are_called_what_keys_begin_with(together: bool, tmp_path: Path) -> None:
    """PEFT puts base_model.model before every key, and DINOv3 calls its blocks ``model``."""
    config, inputs = RegisterConfig(num_registers=2, modules_to_save=["model"]), make_inputs("dinov3")
    base = build("dinov3")
    model: Any = compose(base, {"default": config}) if together else get_peft_model(base, config)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.1 * value.requires_grad
    model.save_pretrained(tmp_path)
    load: Any = load_adapters if together else PeftModel.from_pretrained
    assert_identical(run(load(build("dinov3"), tmp_path).eval(), inputs), run(model.eval(), inputs))


def test_a_head_that_is_called_what_keys_begin_with_is_left_out_alone(tmp_path: Path) -> None:
    whole = torch.nn.ModuleDict({"vit": build("vit"), "model": torch.nn.Linear(4, 4)})
    model = add_registers(whole, 2, modules_to_save=["model"])
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has 'model' trained beside its registers"):
        loaded = PeftModel.from_pretrained(build("vit"), tmp_path)
    weight = find_register_layer(loaded).tokens("default").weight
    assert torch.equal(weight, find_register_layer(model).tokens("default").weight)


def offsets_of(model: Any, name: str) -> torch.Tensor:
    values: torch.Tensor = position_layers(model)[0].offset_positions_values[name].weight.data
    return values


@pytest.mark.parametrize("way", ["PEFT", "transformers"])
@pytest.mark.parametrize("other", ["weight", "embeddings", "offset_positions_values"])
def test_offsets_beside_an_adapter_called_like_a_part_of_their_key(other: str, way: str, tmp_path: Path) -> None:
    model: Any = build("vit")
    if way == "PEFT":
        model = get_peft_model(model, PositionConfig(), adapter_name="own")
        model.add_adapter(other, PositionConfig())
    else:
        for name in ("own", other):
            model.add_adapter(PositionConfig(), name)
        model.set_adapter("own")
    expected = offsets_of(model, "own").normal_().clone()
    model.save_pretrained(tmp_path)
    folder = tmp_path / "own" if way == "PEFT" else tmp_path
    again = PeftModel.from_pretrained(build("vit"), folder, ignore_base_mismatch=True)
    assert torch.equal(offsets_of(again, "default"), expected)


def test_offsets_without_resized_embeddings(resized: Path, tmp_path: Path) -> None:
    model = get_peft_model(with_more_words(resized), PositionConfig())
    model.save_pretrained(tmp_path)
    assert len(read_header(tmp_path / "adapter_model.safetensors")) == 1
    PeftModel.from_pretrained(with_more_words(resized), tmp_path)
    with pytest.raises(ValueError, match="registers and moved position embeddings: they train no"):
        model.save_pretrained(tmp_path / "other", save_embedding_layers=True)


@pytest.mark.parametrize("part", ["offsets", "head"])
def test_offsets_that_no_loader_takes_are_not_written(part: str, tmp_path: Path) -> None:
    model: Any = get_peft_model(build("vit-classifier"), PositionConfig(modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    head = model.get_base_model().classifier.modules_to_save["default"].weight.data
    (offsets_of(model, "default") if part == "offsets" else head).fill_(torch.nan)
    with pytest.raises(ValueError, match="'default' is not saved, since no file with such values can be loaded"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before
