"""Passes of several threads through one model: each gives what it gives alone, and nothing stays changed."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, make_inputs
from peft import PeftModel
from stacks_cases import build_stack, images
from torch import nn

from register_adapter import (
    RegisterAdapterError,
    RegisterConfig,
    RegisterPeftModel,
    add_registers,
    audit,
    capture,
    export_program,
    find_register_layer,
    find_tower,
    get_features,
)
from register_adapter.artifacts import train_detector
from register_adapter.artifacts.norms import patch_norms
from register_adapter.evaluation import analyse_registers, probe_tokens
from register_adapter.evaluation.discovery import discover
from register_adapter.evaluation.discovery.patches import PatchReader, Wanted
from register_adapter.evaluation.downstream.provenance import source_of_features
from register_adapter.features.subjects import keeping_adapters, looking_at, named_subjects
from register_adapter.viz import read_examples, read_maps

MODES: dict[str, dict[str, Any]] = {"input": {}, "late": {"insert_layer": 1}, "deep": {"deep": True}}
Call = Callable[[], Any]


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for item in items for tensor in tensors(item)]


def same(actual: Any, expected: Any) -> bool:
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def agree(*calls: Call, times: int = 15) -> None:
    """Every call, made again and again beside the others, returns what it returns alone; afterwards too."""
    with torch.no_grad():
        expected = [call() for call in calls]
    wrong: list[Any] = []

    def work(call: Call, wanted: Any) -> None:
        try:
            with torch.no_grad():
                wrong.extend("differs" for _ in range(times) if not same(call(), wanted))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with torch.no_grad():
        assert all(same(call(), wanted) for call, wanted in zip(calls, expected, strict=True))


def counters(model: nn.Module) -> list[Any]:
    names = ("num_prefix_tokens", "num_register_tokens")
    return [getattr(module, name) for module in model.modules() for name in names if hasattr(module, name)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["timm", "dinov3-timm", "features_only", "open_clip", "hub"])
def test_methods_past_the_forward(name: str, mode: str) -> None:
    base = build_stack(name)
    before = counters(base)
    model = add_registers(base, 3, init_std=1.0, **MODES[mode]).eval()
    method: Callable[[torch.Tensor], Any] = {
        "features_only": base,
        "hub": lambda x: base.get_intermediate_layers(x, 2),
    }.get(name, lambda x: base.forward_intermediates(x))
    agree(lambda: method(images()), lambda: method(images()[:1]), lambda: model(images()))
    assert counters(base) == before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["timm", "dinov3-timm", "features_only", "open_clip", "hub"])
def test_other_adapters_set_in_mid_method_wait_for_the_next(name: str, mode: str) -> None:
    """As another thread may, behind the embeddings."""
    base = build_stack(name)
    model = add_registers(base, 3, init_std=1.0, **MODES[mode]).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0, **MODES[mode]))
    method: Callable[[torch.Tensor], Any] = {
        "features_only": base,
        "hub": lambda x: base.get_intermediate_layers(x, 2),
    }.get(name, lambda x: base.forward_intermediates(x))
    expected = method(images())
    embeddings: Any = find_tower(base).part("embeddings")
    embeddings.register_forward_hook(lambda *_: model.set_adapter("other"))
    assert same(method(images()), expected)
    assert model.active_adapters == ["other"]
    assert not same(method(images()), expected)


def _features(model: Any) -> Any:
    return get_features(model, images()).values


def _batches(model: Any) -> Any:
    return get_features(model, images().repeat(3, 1, 1, 1), batch_size=2).values


def _norms(model: nn.Module) -> Any:
    return patch_norms(model, [images()] * 3)


def _audit(model: nn.Module) -> Any:
    report = audit(model, images())
    means = [layer.norms["patch"].mean for layer in report.layers]
    return [torch.tensor(value) for value in (means, report.num_registers, list(report.name.encode()))]


def _discovery(model: nn.Module) -> Any:
    with torch.no_grad():
        return list(PatchReader(model, [Wanted("tokens", -1)]).read(images(), (4, 4)).values())


def _probes(model: nn.Module) -> Any:
    pixels = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return _scores(probe_tokens(model, pixels, [0, 1] * 6, batch_size=4, min_images=10, max_iter=5))


def _scores(report: Any) -> torch.Tensor:
    scores = [row.reconstruction_l2 for row in report.rows]
    return torch.tensor([score.value for score in scores if score is not None])


def _maps(model: nn.Module) -> Any:
    maps = read_maps("", model, images())
    return [torch.from_numpy(values) for values in (maps.norms, maps.attention)]


def _examples(model: nn.Module) -> Any:
    examples = read_examples({"model": model, "again": model}, images())
    maps = [shown for example in examples for shown in example.maps.values()]
    return [torch.from_numpy(values) for image in maps for values in (image.norms, image.attention)]


def test_a_program_is_exported_with_the_adapters_of_its_start(tmp_path: Path) -> None:
    """Another thread set another one while it was traced: registers stayed in the program's outputs, in silence."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0))
    expected = model(images()).last_hidden_state
    block = find_tower(model).part("blocks")[-1]
    handle = block.register_forward_hook(lambda *_: model.set_adapter("other"))
    export_program(model, tmp_path / "model.pt2")
    handle.remove()
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert same(program(pixel_values=images())["last_hidden_state"], expected)


def test_threads_look_at_adapters_of_one_model() -> None:
    """Each set its adapter for all threads: features of the other's, and in the end one of them was active for good."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    for count, name in enumerate(("one", "two"), 1):
        model.add_adapter(name, RegisterConfig(num_registers=count, init_std=1.0))
    agree(*(lambda name=name: _features((model, name)) for name in ("one", "two", None)))  # type: ignore[misc]
    assert model.active_adapters == ["default"]
    assert {name for name, part in model.named_parameters() if part.requires_grad} == {
        "base_model.model.registers.register_adapter_tokens.default.weight"
    }


@pytest.mark.parametrize("read", [_features, _batches, _norms, _audit, _discovery, _probes, _maps, _examples])
@pytest.mark.parametrize("other", [1, None], ids=["another", "none"])
def test_what_is_read_behind_a_pass_is_of_its_adapters(read: Callable[[nn.Module], Any], other: int | None) -> None:
    """Another thread set another one in mid-pass, or switched all off: registers were read as patches, in silence."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0))
    layer = find_register_layer(model)
    assert layer is not None
    change = (lambda: model.set_adapter("other")) if other else (lambda: layer.enable_adapters(False))
    expected = read(model)
    handle = find_tower(model).part("blocks")[-1].register_forward_hook(lambda *_: change())
    assert same(read(model), expected)
    handle.remove()
    if read is not _probes:  # whose score these registers hardly change
        assert not same(read(model), expected)


@pytest.mark.parametrize("stock", [False, True])
def test_a_data_set_may_run_the_model_with_adapters_of_its_own(stock: bool) -> None:
    """While it is read: what the reading keeps is for the reading's own passes."""
    base = build("vit").eval()
    config = RegisterConfig(num_registers=3, init_std=1.0)
    expected = base(images()).last_hidden_state
    model: Any = (PeftModel(base, config) if stock else add_registers(base, 3, init_std=1.0)).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0))
    model.set_adapter("other")
    other = model.eval()(images()).last_hidden_state
    model.set_adapter("default")
    wanted, seen = _features(model), []

    def data() -> Iterator[torch.Tensor]:
        for pixels in images():
            with model.disable_adapter():
                seen.append(same(model(images()).last_hidden_state, expected))
            model.set_adapter("other")
            seen.append(same(model.eval()(images()).last_hidden_state, other))
            model.set_adapter("default")
            yield pixels[None]

    assert same(get_features(model, data()).values, wanted)
    assert same(patch_norms(model, data()), patch_norms(model, [images()]))
    assert len(seen) == 4 * len(images())
    assert all(seen)


@pytest.mark.parametrize("read", ["features", "one", "audit", "probes", "analysis", "norms", "discovery", "examples"])
def test_what_a_data_set_runs_is_not_the_reading_s(read: str) -> None:
    """Its ``set_adapter`` was passed over, and what it read of the model itself had the registers of the reading."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0))
    pixels = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def looked() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(images()).last_hidden_state, get_features(model, images())["patch"]]

    own = looked()
    model.set_adapter("other")
    other = looked()
    assert not any(map(same, own, other))
    model.set_adapter("default")
    seen: list[bool] = []

    class Data:
        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, index: int) -> torch.Tensor:
            model.set_adapter("other")
            seen.extend(map(same, looked(), other))
            model.set_adapter("default")
            return pixels[index]

    readers: dict[str, Callable[[Any], Any]] = {
        "features": lambda data: get_features(model, data).values,
        "one": lambda data: get_features((model, "default"), data).values,
        "audit": lambda data: torch.tensor(audit(model, data).layers[-1].norms["patch"].mean),
        "probes": lambda data: _scores(probe_tokens(model, data, [0, 1] * 6, min_images=10, max_iter=5)),
        "analysis": lambda data: analyse_registers(model, data, progress=False).constancy.tolist(),
        "norms": lambda data: patch_norms(model, data),
        "discovery": lambda data: [found.box for found in discover(model, data)],
        "examples": lambda data: [torch.from_numpy(e.maps["m"].norms) for e in read_examples({"m": model}, data)],
    }
    batches = read not in ("discovery", "examples")  # of two images there

    def given(data: Any) -> Any:
        pairs = (torch.stack([data[n], data[n + 1]]) for n in range(0, len(data), 2))
        return pairs if batches else data

    expected = readers[read](given(list(pixels)))
    found = readers[read](given(Data()))
    assert same(found, expected) if tensors(expected) else found == expected
    assert len(seen) >= 2 * len(pixels)
    assert all(seen)
    assert all(map(same, looked(), own))


def test_a_data_set_may_look_into_the_model_while_it_is_read() -> None:
    """An audit counted the data set's own passes among its images; what the data set has opened stays its own."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    expected = _audit(model)
    with capture(model) as trace:
        model(images() + 1)
        wanted = trace.hidden_states
    seen = []

    def data() -> Iterator[torch.Tensor]:
        with capture(model) as own:
            for pixels in images():
                model(images() + 1)
                seen.append(same(own.hidden_states, wanted))
                yield pixels[None]

    report = audit(model, data())
    assert same([torch.tensor([layer.norms["patch"].mean for layer in report.layers])], expected[:1])
    assert len(seen) == len(images())
    assert all(seen)


@pytest.mark.parametrize("stock", [False, True])
def test_what_a_data_set_switches_off_between_its_images_is_on_for_the_reading(stock: bool) -> None:
    """A generator that had adapters disabled around its ``yield`` had the reading be the base's, in silence."""
    base, config = build("vit").eval(), RegisterConfig(num_registers=3, init_std=1.0)
    model: Any = (PeftModel(base, config) if stock else add_registers(base, 3, init_std=1.0)).eval()
    features, report = _features(model), _audit(model)
    seen = []

    def data(pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        with model.disable_adapter():
            for image in pixels:
                seen.append(same(get_features(model, images()).values, features))
                yield image[None]

    assert same(get_features(model, data(images())).values, features)
    audited = audit(model, data(images()))
    assert same([torch.tensor([layer.norms["patch"].mean for layer in audited.layers])], report[:1])
    assert same([torch.tensor(audited.num_registers)], report[1:2])
    assert seen == [False] * 2 * len(images())
    assert same(_features(model), features)


@pytest.mark.parametrize("begun", [0, 1], ids=["new", "begun"])
@pytest.mark.parametrize("read", ["audit", "features"])
def test_an_iterator_that_others_began_or_end_may_set_context_variables(read: str, begun: int) -> None:
    """As ``np.errstate`` does: "Token … was created in a different Context", behind all images of the reading."""
    model: Any = add_registers(build("vit").eval(), 3, init_std=1.0).eval()
    before = np.geterr()

    def data(pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        with np.errstate(all="raise"):
            yield from (image[None] for image in pixels)

    pixels = torch.cat([images(), images()])
    given = data(pixels)
    assert all(same(next(given), pixels[:1]) for _ in range(begun))
    if read == "features":
        assert same(get_features(model, given).values, get_features(model, pixels[begun:]).values)
    else:
        audit(model, given, max_images=1)
        assert same(list(given), list(pixels[begun + 1 :].split(1)))
    assert np.geterr() == before


@pytest.mark.parametrize("end", ["at its end", "early", "by an error"])
@pytest.mark.parametrize("read", ["features", "one", "audit", "norms", "discovery"])
@pytest.mark.parametrize("mode", ["no_grad", "enable_grad", "autocast", "inference"])
def test_torch_s_modes_around_a_yield_are_the_data_set_s_own(mode: str, read: str, end: str) -> None:
    """Gradients stayed off for good behind a data set that ended in the reading, and the reading was in bfloat16.

    In inference mode what was read could not be trained on: "Inference tensors cannot be saved for backward".
    """
    model: Any = add_registers(build("vit").eval(), 3, init_std=1.0).eval()
    pixels, seen = torch.cat([images(), images()]), []
    most = 2 if end == "early" else len(pixels)

    def modes() -> tuple[bool, bool, bool]:
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()

    def data() -> Iterator[torch.Tensor]:
        contexts = {"no_grad": torch.no_grad, "enable_grad": torch.enable_grad, "inference": torch.inference_mode}
        entered = contexts[mode]() if mode in contexts else None
        seen.append(torch.is_grad_enabled())
        with torch.autocast("cpu", torch.bfloat16) if entered is None else entered:
            for place, image in enumerate(pixels):
                before = modes()
                yield image if read == "discovery" else image[None]
                seen.append(modes() == before)
                if place == 1 and end == "by an error":
                    raise KeyError("of the data set")
        seen.append(torch.is_grad_enabled())

    readers: dict[str, Callable[[Any], Any]] = {
        "features": lambda data: get_features(model, data, max_images=most).values,
        "one": lambda data: get_features((model, "default"), data, max_images=most).values,
        "audit": lambda data: [layer.norms["patch"].mean for layer in audit(model, data, max_images=most).layers],
        "norms": lambda data: patch_norms(model, itertools.islice(data, most)),
        "discovery": lambda data: [found.box for found in discover(model, itertools.islice(data, most))],
    }
    expected, before, given = readers[read](pixels if read == "discovery" else pixels.split(1)), modes(), data()
    if end == "by an error":
        with pytest.raises(KeyError, match="of the data set"):
            readers[read](given)
    else:
        found = readers[read](given)
        assert same(found, expected) if tensors(expected) else found == expected
        assert not any(tensor.is_inference() for tensor in tensors(found))
    assert modes() == before == (True, False, False)
    given.close()
    assert modes() == before
    assert all(seen)
    assert len(seen) > 1


def test_a_data_set_may_have_gradients() -> None:
    """The first image's were there, the others' were not: "does not require grad and does not have a grad_fn"."""
    model: Any = add_registers(build("vit").eval(), 3, init_std=1.0).eval()

    def data() -> Iterator[torch.Tensor]:
        for image in images().split(1):
            image.requires_grad_()
            (slope,) = torch.autograd.grad(model(pixel_values=image).last_hidden_state.sum(), image)
            yield image.detach() + slope

    moved = list(data())
    assert [layer.norms["patch"].mean for layer in audit(model, data()).layers] == [
        layer.norms["patch"].mean for layer in audit(model, moved).layers
    ]


@pytest.mark.parametrize("read", [_batches, _norms, _audit, _probes])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_an_adapter_that_is_deleted_ends_a_reading_of_it(
    read: Callable[[nn.Module], Any], alone: bool, again: bool
) -> None:
    """The rest of the images was read without it, or with another of its name, in silence."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    config = RegisterConfig(num_registers=3, init_std=1.0)
    if not alone:
        model.add_adapter("other", config)

    def change(*_: Any) -> None:
        handle.remove()
        model.delete_adapter("default")
        if again:
            model.add_adapter("default", config)
            model.eval()

    handle = find_tower(model).module.register_forward_hook(change)
    with pytest.raises(RegisterAdapterError, match="'default' was deleted while the model was read with it"):
        read(model)
    left = [*(["other"] if not alone else []), *(["default"] if again else [])]
    assert list(model.peft_config) == left
    if left:
        read(model)


@pytest.mark.parametrize("change", ["another", "none"])
def test_a_detector_has_the_kinds_of_what_was_read(change: str) -> None:
    """They were counted behind the passes: sizes that do not match, in a model without CLS."""
    model = add_registers(build("siglip-vision"), 3, init_std=1.0).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0, insert_layer=1))
    layer = find_register_layer(model)
    assert layer is not None
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(2)

    def detector() -> Any:
        trained = train_detector(model, pixels, num_steps=2, progress=False)
        return trained.config.kinds, [*trained.state_dict().values()]

    kinds, values = detector()
    block = find_tower(model).part("blocks")[-1]
    block.register_forward_hook(
        lambda *_: model.set_adapter("other") if change == "another" else layer.enable_adapters(False)
    )
    found, read = detector()
    assert found == kinds
    assert same(read, values)


@pytest.mark.parametrize("kind", ["head", "stock head"])
@pytest.mark.parametrize("names", [("other", "default"), ("other", None), (None, "other"), ("default", "other")])
@pytest.mark.parametrize("nested", [False, True])
def test_overlapping_looks_leave_the_adapter_of_before(kind: str, names: tuple[str | None, ...], nested: bool) -> None:
    """The last that ended put back what another had set: its adapter was active for good, and gradients were off."""
    config = RegisterConfig(num_registers=3, init_std=1.0, modules_to_save=["pooler"])
    base = build("vit").eval()
    model: Any = (
        add_registers(base, 3, init_std=1.0, modules_to_save=["pooler"]) if kind == "head" else PeftModel(base, config)
    )
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0, modules_to_save=["pooler"]))

    def state() -> Any:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return model.active_adapters, model.active_adapter, trained

    before = state()
    expected = model.eval()(images()).pooler_output
    first, second = (looking_at((model, name)) for name in names)
    with ThreadPoolExecutor(1) as thread, ThreadPoolExecutor(1) as another:
        of = {first: thread, second: another}
        for context in (first, second):
            of[context].submit(context.__enter__).result()
        for context in (second, first) if nested else (first, second):
            of[context].submit(context.__exit__, None, None, None).result()
    assert state() == before
    assert same(model(images()).pooler_output, expected)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("read", ["other", None])
def test_what_was_active_may_be_deleted_while_another_is_read(stock: bool, read: str | None) -> None:
    """The reading ended in "Adapter default not found", and what had been read was lost."""
    config = RegisterConfig(num_registers=3, init_std=1.0, modules_to_save=["pooler"])
    model: Any = (PeftModel if stock else RegisterPeftModel)(build("vit"), config).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0, modules_to_save=["pooler"]))
    expected = get_features((model.eval(), read), images()).values

    def data() -> Iterator[torch.Tensor]:
        for number, pixels in enumerate(images()):
            if number == 1:
                model.delete_adapter("default")
            yield pixels[None]

    assert same(get_features((model, read), data()).values, expected)
    assert model.active_adapters == ["other"]
    with torch.no_grad():
        left = model(images()).pooler_output
        model.set_adapter("other")
        assert same(left, model(images()).pooler_output)


@pytest.mark.parametrize("nested", [False, True])
def test_an_overlapping_look_may_lose_its_adapter(nested: bool) -> None:
    """The other one ended in "Adapter other not found"."""
    model = add_registers(build("vit"), 3, init_std=1.0, modules_to_save=["pooler"])
    for name in ("other", "third"):
        model.add_adapter(name, RegisterConfig(num_registers=1, init_std=1.0, modules_to_save=["pooler"]))
    model.set_adapter("default")
    with ThreadPoolExecutor(1) as thread:
        look = looking_at((model, "other"))
        thread.submit(look.__enter__).result()
        with looking_at((model, "third")):
            model.delete_adapter("other")
            if not nested:
                with pytest.raises(RegisterAdapterError, match="'other' was deleted"):
                    thread.submit(look.__exit__, None, None, None).result()
        if nested:
            with pytest.raises(RegisterAdapterError, match="'other' was deleted"):
                thread.submit(look.__exit__, None, None, None).result()
    assert model.active_adapters == ["default"]


@keeping_adapters
def _each(models: Any) -> dict[str, torch.Tensor]:
    read = {}
    for name, subject in named_subjects(models).items():
        with looking_at(subject) as model:
            read[name] = model(images()).last_hidden_state
    return read


@pytest.mark.parametrize("kind", ["registers", "stock", "head"])
def test_adapters_that_are_kept_are_not_those_of_another_subject(kind: str) -> None:
    options: dict[str, Any] = {"num_registers": 3, "init_std": 1.0}
    options |= {"modules_to_save": ["pooler"]} if kind == "head" else {}
    base = build("vit").eval()
    wanted = {"base": base(images()).last_hidden_state}
    model: Any = PeftModel(base, RegisterConfig(**options)) if kind == "stock" else add_registers(base, **options)
    model.add_adapter("other", RegisterConfig(num_registers=1, init_std=1.0))
    for name in ("other", "default"):
        model.set_adapter(name)
        wanted[f"+ {name}"] = model.eval()(images()).last_hidden_state
    read = _each(model)
    assert read.keys() == wanted.keys()
    assert all(same(read[name], value) for name, value in wanted.items())


@keeping_adapters
def _twice(models: Any, between: Callable[[], None]) -> list[torch.Tensor]:
    """As training and test images are read."""
    read = []
    for subject in models.values():
        for _ in range(2):
            with looking_at(subject) as model:
                read.append(model(images()).last_hidden_state)
            between()
    return read


@pytest.mark.parametrize("on", [True, False])
def test_an_adapter_is_looked_at_as_at_the_start(on: bool) -> None:
    """All were switched off between training and test images of ``(model, name)``: registers for one alone."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    layer = find_register_layer(model)
    assert layer is not None
    layer.enable_adapters(on)
    expected = model(images()).last_hidden_state
    subjects = {"one": (model, "default"), "two": (model, "default")}
    read = _twice(subjects, lambda: layer.enable_adapters(not on))
    assert all(same(value, expected) for value in read)


@pytest.mark.parametrize("heads", [None, ["pooler"]], ids=["registers", "head"])
def test_registers_are_analysed_beside_passes(heads: list[str] | None) -> None:
    """The base's part of it took the registers out of every thread's passes, and could leave them out for good."""
    model = add_registers(build("vit"), 3, init_std=1.0, modules_to_save=heads).eval()
    pixels = images().repeat(4, 1, 1, 1) + torch.arange(4).repeat_interleave(len(images()))[:, None, None, None]

    def analysis() -> Any:
        report = analyse_registers(model, list(pixels.split(2)), progress=False)
        assert report.drift is not None
        return [torch.tensor(getattr(report.drift, name).value) for name in ("cls", "patches")]

    agree(analysis, analysis, lambda: model(images()).last_hidden_state, times=5)
    layer = find_register_layer(model)
    assert layer is not None
    assert not layer.disable_adapters


@pytest.mark.parametrize("options", [*MODES.values(), {"key_value": True}, {"gate": -1.0}], ids=str)
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_each_thread_has_adapters_of_its_own(name: str, options: dict[str, Any]) -> None:
    model = add_registers(build(name, "sdpa"), 2, "two", init_std=1.0, **options)
    model.add_adapter("five", RegisterConfig(num_registers=5, init_std=1.0, **options))
    inputs = make_inputs(name)
    model.eval()

    def plain() -> Any:
        return model(**inputs).last_hidden_state

    def disabled() -> Any:
        with model.disable_adapter():
            return model(**inputs).last_hidden_state

    def named(*names: str) -> Call:
        return lambda: model(**inputs, adapter_names=list(names)).last_hidden_state

    agree(plain, disabled, named("five", "__base__"), named("two", "five"))


@pytest.mark.parametrize("options", [{}, {"key_value": True}], ids=str)
def test_captures_overlap(options: dict[str, Any]) -> None:
    model, inputs = add_registers(build("vit", "sdpa"), 2, init_std=1.0, **options).eval(), make_inputs("vit")
    other = {key: value + 1 for key, value in inputs.items()}

    def recorded(given: dict[str, Any]) -> Call:
        def call() -> Any:
            with capture(model) as trace:
                model(**given)
            return [*trace.hidden_states, *trace.attentions]

        return call

    agree(recorded(inputs), recorded(other), lambda: model(**inputs).last_hidden_state)
    assert find_tower(model).config._attn_implementation == "sdpa"


def test_masks_of_two_threads_and_register_neurons() -> None:
    model = add_registers(build("siglip2-vision"), 2, init_std=1.0, register_neurons={1: [0, 5]}).eval()
    inputs = make_inputs("siglip2-vision")
    name = next(key for key in inputs if "mask" in key)
    masked = {**inputs, name: inputs[name].clone()}
    masked[name][:, -1] = 0
    agree(lambda: model(**inputs).last_hidden_state, lambda: model(**masked).last_hidden_state)


def test_a_pass_goes_on_as_it_began() -> None:
    """An adapter that another thread switches off for all threads stays in a pass that is under way."""
    model, inputs = add_registers(build("vit"), 2, init_std=1.0).eval(), make_inputs("vit")
    expected = model(**inputs).last_hidden_state
    layer = find_register_layer(model)
    block = find_tower(model).part("blocks")[1]
    handle = block.register_forward_pre_hook(lambda module, args: layer.enable_adapters(False))
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    handle.remove()
    layer.enable_adapters(True)


def test_what_an_adapter_s_features_depend_on_is_of_that_adapter() -> None:
    """Stored features of one would be taken for another's."""
    model = add_registers(build("vit"), 3, init_std=1.0).eval()
    model.add_adapter("other", RegisterConfig(num_registers=1))
    default, other = (source_of_features((model, name), None, False)["adapters"] for name in ("default", "other"))
    assert default == source_of_features(model, None, False)["adapters"] != other
