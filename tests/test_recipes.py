"""The recipes of examples/, run as a user runs them, on small models; stopped, they go on to the same adapter."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import transformers as tf
from command_line import COMMAND, run_here
from processes import run_killed
from training_cases import start
from training_helpers import ROOT, write_planted

from register_adapter.testbed import load_image_processor

pytestmark = pytest.mark.slow

RECIPES = sorted(path.stem for path in (ROOT / "examples" / "recipes").glob("*.sh"))
SHORT = ["--max-train-steps", "2", "--checkpointing-steps", "1", "--per-device-train-batch-size", "8", "--use-cpu"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model, a CLIP, and scenes in two classes of the model's."""
    folder = tmp_path_factory.mktemp("case")
    write_planted(folder, 32, seed=5, places=("blue star", "red circle"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 80, "patch_size": 8}
    tf.CLIPModel(tf.CLIPConfig(vision_config=vision, text_config=sizes)).save_pretrained(folder / "clip")
    load_image_processor().save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``register-adapter`` that says what it is called with: words, each ended by 0, as is the call.

    Of a fit there is an empty config, as if it had found something.
    """
    tool = tmp_path_factory.mktemp("tools") / "register-adapter"
    fitted = '[ "$1" != fit ] || { mkdir -p "${@: -1}"; touch "${@: -1}/adapter_config.json"; }'
    tool.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" ''\n{fitted}\n")
    tool.chmod(0o755)
    return tool.parent


def calls(name: str, case: Path, tools: Path, out: Path, *more: str) -> list[list[str]]:
    """What the recipe calls ``register-adapter`` with."""
    given = {"MODEL": str(case / ("clip" if "clip" in name else "model")), "DATA": str(case / "images")}
    places = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OUT": str(out)}
    # The flags come last, where they win.
    words = ["bash", str(ROOT / "examples" / "recipes" / f"{name}.sh"), *SHORT, *more]
    done = subprocess.run(words, env=os.environ | given | places, stdout=subprocess.PIPE, text=True, check=True)
    config = Path(f"{out}.fitted", "adapter_config.json")
    if config.exists() and not config.stat().st_size:
        config.unlink()
    return [call.split("\0") for call in done.stdout.removesuffix("\0\0").split("\0\0")]


def run(call: list[str]) -> None:
    """The command in this process, which has the libraries imported."""
    if call[0] == "train":
        start(call[1:])
    else:
        run_here(*call)


def weights(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.glob("**/adapter_model.safetensors") if "checkpoint" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, case: Path, tools: Path, tmp_path: Path) -> None:
    for call in calls(name, case, tools, tmp_path / "out"):
        run(call)
    assert weights(tmp_path / "out")


def test_a_killed_recipe_goes_on_to_the_same_adapter(case: Path, tools: Path, tmp_path: Path) -> None:
    """Started again by the very same line; a run that was never killed ends at the same."""
    name, more, out = "dinov2_refine_lora", ("--max-train-steps", "5"), tmp_path / "killed"
    (call,) = calls(name, case, tools, out, *more)
    run_killed(out / "checkpoint-1", COMMAND, *call)
    assert list(out.glob("checkpoint-*"))
    assert not weights(out)
    run(call)
    run(*calls(name, case, tools, tmp_path / "whole", *more))
    assert weights(out) == weights(tmp_path / "whole")


def test_each_says_how_it_is_run_on_one_and_on_eight() -> None:
    for path in (ROOT / "examples" / "recipes").glob("*.sh"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 60
        assert f"examples/recipes/{path.name}" in text
        assert "--num_processes 8" in text


def test_nothing_is_trained_from_a_fit_that_found_nothing(tmp_path: Path) -> None:
    tool = tmp_path / "register-adapter"
    tool.write_text('#!/bin/sh\necho "$1"\n')  # a fit of a clean model ends well and writes nothing
    tool.chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "images", "OUT": str(tmp_path / "out")}
    words = ["bash", str(ROOT / "examples" / "recipes" / "from_test_time.sh")]
    done = subprocess.run(words, env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "fit\n")
    assert done.stderr == "error: nothing was fitted, so there is nothing to train from\n"
