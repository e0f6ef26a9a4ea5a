"""What PEFT's own tests ask of a method, and what its users see when they ask for something wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from families import build, make_inputs
from helpers import run
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting

from register_adapter import (
    AdapterFileError,
    HubAccessError,
    PositionConfig,
    RegisterConfig,
    RegisterPeftModel,
    add_registers,
    compose,
    rename_adapter,
)
from register_adapter.utils import hub


def test_adapter_names_are_one_an_image_and_peft_s_messages_are_kept() -> None:
    model, inputs = get_peft_model(build("vit-classifier"), RegisterConfig()).eval(), make_inputs("vit-classifier")
    pixels = inputs["pixel_values"]
    for names in (["default"], ["__base__"], ["__base__"] * (len(pixels) + 1)):
        with pytest.raises(ValueError, match=f"adapter_names has {len(names)} names for a batch of {len(pixels)}"):
            model(pixel_values=pixels, adapter_names=names)
        with pytest.raises(ValueError, match="names for a batch of"):
            model(pixels, adapter_names=names)
    with pytest.raises(ValueError, match="Trying to infer with non-existing adapter"):
        model(pixel_values=pixels, adapter_names=["other"] * len(pixels))
    model.train()
    for name in ("default", "__base__"):
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
            model(pixel_values=pixels, adapter_names=[name] * len(pixels))


@pytest.mark.parametrize("name", ["weight", "bias", "classifier"])
def test_a_name_that_a_head_has_is_refused_first(name: str) -> None:
    base = build("vit-classifier")
    with pytest.raises(ValueError, match=f"called '{name}' cannot have 'classifier' in modules_to_save"):
        get_peft_model(base, RegisterConfig(modules_to_save=["classifier"]), name)
    assert not getattr(base, "peft_config", {})
    assert not hasattr(base.vit, "registers")
    run(get_peft_model(base, RegisterConfig(), name), make_inputs("vit-classifier"))  # without a head it is free


HEADED: dict[str, Callable[..., PeftConfig]] = {
    "registers": RegisterConfig,
    "positions": PositionConfig,
    "LoRA": partial(LoraConfig, target_modules=["q_proj", "query"]),
}


@pytest.mark.parametrize("way", ["PEFT", "compose", "rename"])
@pytest.mark.parametrize("method", HEADED)
def test_so_it_is_for_every_method_and_way_in(method: str, way: str) -> None:
    """PEFT would write the head's tensors under keys that nothing loads."""
    base, config = build("vit-classifier"), HEADED[method](modules_to_save=["classifier"])
    if method == "LoRA" and way == "PEFT":
        pytest.skip("PEFT's own")
    model = compose(base, {"own": config}) if way == "rename" else base
    for name in ("weight", "classifier"):
        before = list(model.state_dict())
        calls: dict[str, Callable[[], Any]] = {
            "PEFT": partial(get_peft_model, model, config, name),
            "compose": partial(compose, model, {name: config}),
            "rename": partial(rename_adapter, model, "own", name),
        }
        with pytest.raises(ValueError, match=f"called '{name}' cannot have 'classifier' in modules_to_save"):
            calls[way]()
        assert list(model.state_dict()) == before
    if way == "rename":
        rename_adapter(model, "own", "modules_to_save")
        assert list(model.peft_config) == ["modules_to_save"]


def test_the_model_runs_when_the_last_adapter_is_gone() -> None:
    model = add_registers(build("vit-classifier"))
    inputs = make_inputs("vit-classifier")
    model.delete_adapter("default")
    assert not model.has_active_enabled_adapter
    assert run(model, inputs)


def test_input_casting_can_be_switched_off() -> None:
    model = get_peft_model(build("vit-classifier"), RegisterConfig())
    with disable_input_dtype_casting(model):
        run(model, make_inputs("vit-classifier"))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_config_that_is_handed_in_is_the_one_in_use(is_trainable: bool, tmp_path: Path) -> None:
    config = RegisterConfig()
    get_peft_model(build("vit"), config).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(build("vit"), str(tmp_path), config=config, is_trainable=is_trainable)
    assert model.peft_config["default"] is config
    assert config.inference_mode is not is_trainable


def test_a_folder_without_its_files_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    monkeypatch.setattr(hub, "file_exists", refuse)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.find_weights("some/folder", None, {}) is None
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        hub.find_config("some/folder", None, {})
    config = RegisterConfig()
    config.save_pretrained("some/folder")
    for given in (None, config):
        with pytest.raises(AdapterFileError, match="has no weights"):
            RegisterPeftModel.from_pretrained(build("vit"), "some/folder", config=given)


@pytest.mark.parametrize("kind", [RuntimeError, OSError, hub.EntryNotFoundError])
def test_no_error_on_the_way_to_the_hub_shows_the_token(kind: type[Exception]) -> None:
    import traceback

    class Odd(kind):  # type: ignore[misc, valid-type]
        def __init__(self, text: str) -> None:
            Exception.__init__(self, text)

    token = "_".join(("hf", "secret"))
    with pytest.raises(HubAccessError) as caught, hub.hub_errors("me/repo", token=token):
        raise Odd(f"sent Bearer {token}")
    assert token not in "".join(traceback.format_exception(caught.value))
