"""Where registers enter, augmentation, and settings from a file: what the flags of ``train`` do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from training_cases import RUN, flags, results_of, start, stopped, write_case
from training_helpers import adapter_bytes

from register_adapter.data import AUGMENTATIONS, Augmentation, ProcessedDataset
from register_adapter.training.launch import _make_parser, _parse

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "configs" / "run.yaml"
SHORT = ("--max-train-steps", "1")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("case"))


# Where registers enter


@pytest.mark.parametrize(
    ("more", "shape"),
    [
        (("--insert-layer", "1"), (4, 32)),
        (("--deep", "--insert_layer", "1"), (1, 4, 32)),
        (("--key_value",), (2, 2, 4, 32)),
        (("--gate", "-5"), (4, 32)),
    ],
)
def test_the_adapter_has_the_registers_that_flags_ask_for(
    more: tuple[str, ...], shape: tuple[int, ...], case: Path, tmp_path: Path
) -> None:
    start(flags(case, tmp_path, *SHORT, *more))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"insert_layer": 1} if any("insert" in word for word in more) else {}
    wanted |= {"deep": True} if "--deep" in more else {}
    wanted |= {"key_value": True} if "--key_value" in more else {}
    wanted |= {"gate": -5.0} if "--gate" in more else {}
    defaults = {"insert_layer": 0, "deep": False, "key_value": False, "gate": None}
    assert {name: config[name] for name in defaults} == {**defaults, **wanted}
    (weight,) = [v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if k.endswith("tokens.weight")]
    assert weight.shape == shape


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--insert-layer", "-1"), "insert_layer must be at least 0, got -1"),
        (("--deep", "--key-value"), "choose one of them"),
        (("--gate", "nan"), "gate must be a finite number"),
        (("--init", "test_time", "--gate", "-5", "--deep"), "leave out --deep, --gate"),
        (("--adapter-name-or-path", "x", "--insert-layer", "2"), "leave out --insert-layer"),
        (("--augmentation", "flip,corp"), "got 'flip,corp'; did you mean 'crop'?"),
        (("--no-such-steps", "1", "--evalsteps=3"), "--no-such-steps, --evalsteps; did you mean --eval-steps?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    more: tuple[str, ...], message: str, case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped(flags(case, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Augmentation


def image(width: int = 24, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("names", [*AUGMENTATIONS, "crop,flip,colour"])
def test_an_augmentation_depends_on_seed_epoch_and_number_alone(names: str) -> None:
    augment, again = Augmentation(names), Augmentation(names)
    seen = {(epoch, index): augment(image(), epoch, index).tobytes() for epoch in range(4) for index in range(4)}
    assert all(again(image(), *key).tobytes() == value for key, value in reversed(seen.items()))
    assert len(set(seen.values())) > 1
    other = Augmentation(names, seed=1)
    assert any(other(image(), *key).tobytes() != value for key, value in seen.items())


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (50, 2)])
def test_the_smallest_images_are_augmented(size: tuple[int, int]) -> None:
    for index in range(20):
        out = Augmentation("crop,flip,colour")(image(*size), 0, index)
        assert out.mode == "RGB"
        assert out.width <= size[0]
        assert out.height <= size[1]


def test_an_epoch_changes_augmented_items_only() -> None:
    def process(images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.from_numpy(np.array(images.resize((8, 8)))).permute(2, 0, 1)[None].float()}

    items = [{"image": image(), "label": 0}]
    plain, augmented = ProcessedDataset(items, process), ProcessedDataset(items, process, Augmentation("crop"))
    first = [data[0]["pixel_values"] for data in (plain, augmented)]
    for data in (plain, augmented):
        data.set_epoch(1)
    assert torch.equal(plain[0]["pixel_values"], first[0])
    assert not torch.equal(augmented[0]["pixel_values"], first[1])


def test_an_augmented_run_is_resumed_bit_for_bit_and_evaluated_without(case: Path, tmp_path: Path) -> None:
    more = (*RUN, "--augmentation", "crop,flip")
    start(flags(case, tmp_path / "whole", *more, "--checkpointing-steps", "5"))
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    workers = ("--dataloader-num-workers", "1")
    start(flags(case, tmp_path / "parts", *more, *workers, "--resume-from-checkpoint", checkpoint))
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(tmp_path / "whole")
    assert results_of(tmp_path / "whole")["augmentation"] == "crop,flip"
    start(flags(case, tmp_path / "plain", *RUN))
    assert adapter_bytes(tmp_path / "plain") != adapter_bytes(tmp_path / "whole")


# Settings from a file


def parse(*argv: str) -> dict[str, Any]:
    *parts, flags = _parse(_make_parser("train"), argv)
    return {name: value for part in [*parts, flags] for name, value in vars(part).items()}


def test_a_run_leaves_settings_that_start_it_again(case: Path, tmp_path: Path) -> None:
    more = ("--max-train-steps", "2", "--gate", "-5", "--mixed-precision", "no", "--num-registers", "2")
    start(flags(case, tmp_path / "a", *more, "--learning-rate", "1e-05", "--json"))
    written = tmp_path / "a" / "run.yaml"
    start(["--config", str(written), "--output-dir", str(tmp_path / "b")])
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    settings = [yaml.safe_load((tmp_path / name / "run.yaml").read_text()) for name in "ab"]
    assert settings[0].pop("output-dir") != settings[1].pop("output-dir")
    assert settings[0] == settings[1]
    assert (settings[0]["mixed-precision"], settings[0]["gate"], settings[0]["freeze-head"]) == ("no", -5.0, False)
    assert not {"json", "config", "overwrite-output-dir"} & set(settings[0])


def test_a_refused_run_leaves_the_settings_of_the_first(case: Path, tmp_path: Path) -> None:
    start(flags(case, tmp_path, *SHORT, "--checkpointing-steps", "1"))
    before = (tmp_path / "run.yaml").read_bytes()
    assert stopped(flags(case, tmp_path, *SHORT, "--seed", "9", "--resume-from-checkpoint", "latest")) == 1
    assert (tmp_path / "run.yaml").read_bytes() == before


CONFIG = """
model_name_or_path: some/model
train-dir: images
output-dir: {out}
learning_rate: 1e-3
mixed-precision: no
max-grad-norm: 0
freeze-head: true
checkpointing-steps: epoch
gate: ~
json: yes
"""


def test_flags_on_the_command_line_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("json: yes", "json: true").format(out=tmp_path))
    settings = parse("--config", str(path))
    wanted = {"model_name_or_path": "some/model", "learning_rate": 1e-3, "mixed_precision": "no", "gate": None}
    wanted |= {"max_grad_norm": 0.0, "freeze_head": True, "checkpointing_steps": "epoch", "json": True}
    assert {name: settings[name] for name in wanted} == wanted
    for given in (["--freeze_head", "false"], ["--freeze-head=false"]):
        settings = parse(*given, "--learning_rate", "0.5", f"--config={path}", "--gate", "-3")
        assert (settings["learning_rate"], settings["freeze_head"], settings["gate"]) == (0.5, False, -3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning-rate: 1", "run.yaml, line 1: there is no flag 'lerning-rate'; did you mean --learning-rate?"),
        ("seed: 1\nEval_Step: 3", "line 2: there is no flag 'Eval_Step'; did you mean --eval-steps?"),
        ("xyzzy: 1", "there is no flag 'xyzzy'\n"),
        ("num-views: 2", "line 1: there is no flag 'num-views' (a flag of --objective distillation"),
        ("config: other.yaml", "run.yaml, line 1: config is no setting of a run"),
        ("[seed]: 1", "run.yaml, line 1: the name of a flag must be a single value"),
        ("seed: 1\nseed: 2", "line 2: seed is given twice"),
        ("max-train-steps: 1\nmax_train_steps: 2", "line 2: max_train_steps is given twice"),
        ("seed: fast", "line 1: argument --seed: invalid int value: 'fast'"),
        ("seed: [1, 2]", "seed must be a single value"),
        ("mixed-precision: int4", "invalid choice: 'int4'"),
        ("json: maybe", "json must be true or false, got 'maybe'"),
        ("- seed", "must have lines such as"),
        ("", "must have lines such as"),
        ("seed: 'x", "is not YAML in UTF-8"),
        ("seed: !!python/object/apply:os.system [ls]", "seed must be a single value"),
        ("learning-rate: nan", "learning_rate must be a finite number"),
        (b"\xff\xfe\x00", "is not YAML in UTF-8"),
        ("seed: 1\n" * 10_000, "is larger than a file of settings can be (65536 bytes)"),
    ],
)
def test_a_bad_file_is_refused_by_name(
    text: str | bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as stop:
        parse("--config", str(path), "--model-name-or-path", "m", "--train-dir", "d", "--output-dir", str(tmp_path))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SystemExit):
            parse("--config", str(path))
        assert f"error: {path} cannot be read: " in capsys.readouterr().err.splitlines()[-1]


def test_the_example_is_read() -> None:
    settings = parse("--config", str(EXAMPLE))
    assert settings["model_name_or_path"] == "facebook/dinov2-small"
    assert settings["eval_steps"]
