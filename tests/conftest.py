"""Test-wide settings: no network, no GPU, one thread, quiet libraries; ``--fast`` runs one case of each kind."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("REGISTER_ADAPTER_TEST_GPU") != "1":
    # What a CPU gives bit for bit is tested on a CPU, also where there is a GPU; ``make test-gpu`` shows it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # the process that hands tests out waits ten seconds for libraries that it does not need
    import torch
    import transformers

    import register_adapter  # noqa: F401 - registers the method with PEFT

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="one case of each test function, of tests over other libraries one a library; none that is marked slow",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    kept: dict[tuple[str, str], pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            kept.setdefault((item.nodeid.partition("[")[0], _library(item)), item)
    chosen = set(kept.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _library(item: pytest.Item) -> str:
    """The family of the case's model, for models outside transformers; otherwise nothing."""
    models = getattr(getattr(item, "module", None), "STACKS", None)
    name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
    stack = models.get(name) if isinstance(models, dict) and isinstance(name, str) else None
    return str(getattr(stack, "family", ""))
