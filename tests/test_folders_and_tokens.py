"""A folder is never looked up on the Hub, and no error on the way to the Hub shows a token."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.utils.save_and_load
import pytest
import transformers as tf
from families import build
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import AutoPeftModel, PeftModel

from register_adapter import (
    AdapterFileError,
    HubAccessError,
    RegisterConfig,
    RegisterPeftModel,
    add_registers,
    compose,
    load_adapters,
)
from register_adapter.data import texts
from register_adapter.data.checking import named_errors
from register_adapter.utils import hub
from register_adapter.utils.models import loading

LOADERS: dict[str, Callable[[str], Any]] = {
    "PeftModel": lambda name: PeftModel.from_pretrained(build("vit"), name),
    "trainable": lambda name: PeftModel.from_pretrained(build("vit"), name, is_trainable=True),
    "RegisterPeftModel": lambda name: RegisterPeftModel.from_pretrained(build("vit"), name),
    "load_adapter": lambda name: add_registers(build("vit"), 2).load_adapter(name, "more"),
    "to train": lambda name: add_registers(build("vit"), 2).load_adapter(name, "more", is_trainable=True),
    "composed": lambda name: compose(build("vit"), {"a": RegisterConfig()}).load_adapter(name, "a", is_trainable=True),
    "transformers": lambda name: build("vit").load_adapter(name),
    "AutoModel": tf.AutoModel.from_pretrained,
    "AutoPeftModel": AutoPeftModel.from_pretrained,
    "load_adapters": lambda name: load_adapters(build("vit"), name),
}
#: Loaders of PEFT's that ask it for a config first, which a folder without one does not have.
OURS = ("RegisterPeftModel", "load_adapter", "to train", "composed", "load_adapters")


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"the Hub was asked for {args} {kwargs}")

    for module in (peft.utils.save_and_load, hub):
        for name in ("hf_hub_download", "file_exists"):
            monkeypatch.setattr(module, name, asked)
    monkeypatch.setattr(peft.config, "hf_hub_download", asked)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_without_weights(loader: str) -> None:
    build("vit").save_pretrained("base")
    add_registers(tf.ViTModel.from_pretrained("base"), 2).save_pretrained("user/adapter")
    Path("user/adapter/adapter_model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="user/adapter"):
        LOADERS[loader]("user/adapter")


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("loader", [loader for loader in LOADERS if loader not in ("trainable", "AutoPeftModel")])
def test_a_folder_with_the_config_of_an_adapter_to_come(loader: str) -> None:
    build("vit").save_pretrained("base")
    RegisterConfig(base_model_name_or_path="base").save_pretrained("user/adapter")
    with pytest.raises(AdapterFileError, match="user/adapter"):
        LOADERS[loader]("user/adapter")


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("loader", OURS)
def test_an_empty_folder(loader: str) -> None:
    Path("user/adapter").mkdir(parents=True)
    with pytest.raises(AdapterFileError, match="user/adapter"):
        LOADERS[loader]("user/adapter")


def _wrapped(error: Exception) -> Exception:
    outer = RuntimeError("a thread failed")
    outer.__cause__ = error
    return outer


def _lacking(error: Exception) -> Exception:
    outer = LocalEntryNotFoundError("cannot find it")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize("wrap", [lambda error: error, _wrapped, _lacking], ids=["bare", "in a thread", "not cached"])
@pytest.mark.parametrize("given", [True, False], ids=["argument", "environment"])
def test_no_token_in_the_error_of_a_readme_that_cannot_be_fetched(
    wrap: Callable[[Exception], Exception], given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "_".join(("hf", "secret"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise wrap(ValueError(f"illegal header value b'Bearer {token}'"))

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(HubAccessError) as caught, hub.hub_errors("user/adapter", token=token if given else None):
        hub.fetch("user/adapter", "README.md", None, {"token": token if given else None})
    assert token not in "".join(traceback.format_exception(caught.value))


READERS: dict[str, Callable[[str], AbstractContextManager[None]]] = {
    "model": loading,
    "image processor": lambda name: loading(name, "image processor"),
    "data set": named_errors,
    "tokenizer": lambda name: nullcontext(),
}


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refused the token for 'user/base'"), (None, "'user/base' cannot be reached")]
)
@pytest.mark.parametrize("reader", READERS)
def test_what_another_library_was_refused_by_the_hub_is_told_in_one_line_without_the_token(
    reader: str, status: int | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "_".join(("hf", "secret"))

    def fail(*args: Any, **kwargs: Any) -> None:
        refused = hub._HTTP_ERRORS[0](f"not for you\nBearer {token}")
        refused.response = SimpleNamespace(status_code=status)
        raise OSError(f"There was a specific connection error with user/base:\n{refused}") from refused

    monkeypatch.setattr(hub, "get_token", lambda: token)
    monkeypatch.setattr(texts.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(HubAccessError, match=message) as caught, READERS[reader]("user/base"):
        texts.load_tokenizer("user/base") if reader == "tokenizer" else fail()
    assert token not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way", ["RegisterPeftModel", "load_adapter"])
def test_what_peft_was_refused_when_it_looks_for_the_weights_again_is_told_without_the_token(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "_".join(("hf", "secret"))
    add_registers(build("vit"), 2).save_pretrained(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> None:
        refused = hub._HTTP_ERRORS[0](f"not for you\nBearer {token}")
        refused.response = SimpleNamespace(status_code=401)
        raise refused

    monkeypatch.setattr(hub, "get_token", lambda: token)
    monkeypatch.setattr("peft.peft_model.load_peft_weights", fail)
    with pytest.raises(HubAccessError, match="refused the token") as caught:
        LOADERS[way](str(tmp_path))
    assert token not in "".join(traceback.format_exception(caught.value))


def test_a_file_that_came_shorter_than_the_hub_said_is_told_in_one_line() -> None:
    with pytest.raises(HubAccessError, match="whether the network wants a login") as caught, hub.hub_errors("user/a"):
        raise OSError("Consistency check failed: file should be of size 2119 but has size 24 (README.md).\nRetry.")
    assert "\n" not in str(caught.value)
