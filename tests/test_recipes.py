"""The recipes of examples/, run as a user runs them, on small models; stopped, they go on to the same adapter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from training_helpers import ENVIRONMENT, ROOT, write_planted

from register_adapter.testbed import load_image_processor

pytestmark = pytest.mark.slow

RECIPES = sorted(path.stem for path in (ROOT / "examples" / "recipes").glob("*.sh"))
QUIETLY: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 900, "check": False}
SHORT = ["--max-train-steps", "2", "--checkpointing-steps", "1", "--per-device-train-batch-size", "8", "--use-cpu"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model, a CLIP, and scenes in two classes of the model's."""
    folder = tmp_path_factory.mktemp("case")
    write_planted(folder, 64, seed=5, places=("blue star", "red circle"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 80, "patch_size": 8}
    tf.CLIPModel(tf.CLIPConfig(vision_config=vision, text_config=sizes)).save_pretrained(folder / "clip")
    load_image_processor().save_pretrained(folder / "clip")
    return folder


def command(name: str, case: Path, out: Path, *more: str) -> dict[str, Any]:
    """Arguments of a process."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"MODEL": str(case / ("clip" if "clip" in name else "model")), "DATA": str(case / "images")}
    # The flags come last, where they win.
    words = ["bash", str(ROOT / "examples" / "recipes" / f"{name}.sh"), *SHORT, *more]
    return {"args": words, "env": {**ENVIRONMENT, **given, "PATH": tools, "OUT": str(out), "PYTHONPATH": str(ROOT)}}


def weights(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.glob("**/adapter_model.safetensors") if "checkpoint" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, case: Path, tmp_path: Path) -> None:
    done = subprocess.run(**command(name, case, tmp_path / "out"), **QUIETLY)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out")


@pytest.mark.parametrize("name", ["dinov2_distillation", "dinov2_refine_lora"])
def test_a_killed_recipe_goes_on_to_the_same_adapter(name: str, case: Path, tmp_path: Path) -> None:
    """Started again by the very same line; a run that was never killed ends at the same."""
    more, out = ("--max-train-steps", "6"), tmp_path / "killed"
    process = subprocess.Popen(**command(name, case, out, *more), stderr=subprocess.DEVNULL, start_new_session=True)
    while not (out / "checkpoint-1").is_dir() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = len(list(out.glob("checkpoint-*")))
    assert left
    for place in (out, tmp_path / "whole"):
        done = subprocess.run(**command(name, case, place, *more), **QUIETLY)
        assert done.returncode == 0, done.stderr
    assert weights(out) == weights(tmp_path / "whole")


def test_each_says_how_it_is_run_on_one_and_on_eight() -> None:
    for path in (ROOT / "examples" / "recipes").glob("*.sh"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 60
        assert f"examples/recipes/{path.name}" in text
        assert "--num_processes 8" in text
