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
from training_cases import start
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


def command(name: str, case: Path, out: Path, *more: str, **environment: str) -> dict[str, Any]:
    """Arguments of a process."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"MODEL": str(case / ("clip" if "clip" in name else "model")), "DATA": str(case / "images")}
    places = {"PATH": tools, "OUT": str(out), "PYTHONPATH": str(ROOT)}
    # The flags come last, where they win.
    words = ["bash", str(ROOT / "examples" / "recipes" / f"{name}.sh"), *SHORT, *more]
    return {"args": words, "env": {**ENVIRONMENT, **given, **places, **environment}}


def run_here(name: str, case: Path, out: Path, *more: str) -> None:
    """The recipe's command in this process, which has the libraries imported."""
    done = subprocess.run(**command(name, case, out, *more, LAUNCH="printf %s\\0 train"), **QUIETLY)
    assert done.returncode == 0, done.stderr
    start(done.stdout.split("\0")[1:-1])  # before them stands what a fit has printed


def weights(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.glob("**/adapter_model.safetensors") if "checkpoint" not in str(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, case: Path, tmp_path: Path) -> None:
    run_here(name, case, tmp_path / "out")
    assert weights(tmp_path / "out")


def test_a_killed_recipe_goes_on_to_the_same_adapter(case: Path, tmp_path: Path) -> None:
    """Started again by the very same line; a run that was never killed ends at the same."""
    name, more, out = "dinov2_refine_lora", ("--max-train-steps", "6"), tmp_path / "killed"
    process = subprocess.Popen(**command(name, case, out, *more), stderr=subprocess.DEVNULL, start_new_session=True)
    while not (out / "checkpoint-1").is_dir() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(out.glob("checkpoint-*"))
    done = subprocess.run(**command(name, case, out, *more), **QUIETLY)
    assert done.returncode == 0, done.stderr
    run_here(name, case, tmp_path / "whole", *more)
    assert weights(out) == weights(tmp_path / "whole")


def test_each_says_how_it_is_run_on_one_and_on_eight() -> None:
    for path in (ROOT / "examples" / "recipes").glob("*.sh"):
        text = path.read_text("utf-8")
        assert len(text.splitlines()) <= 60
        assert f"examples/recipes/{path.name}" in text
        assert "--num_processes 8" in text
