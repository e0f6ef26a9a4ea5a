"""What is shipped: the wheel's content, what an import does, docstrings, and the layers between modules."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from processes import run_script, run_script_alone

import register_adapter

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "register_adapter"
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "register_adapter."))
CORE = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface-hub"}

#: Lowest first: a module imports from its own layer or a lower one, never from a higher one. A package stands for all
#: its modules. docs/architecture.md says what each of them is.
LAYERS = (
    ("errors",),
    ("utils",),
    ("towers",),
    ("data",),
    ("tuner",),
    ("export",),
    ("features",),
    ("artifacts",),
    ("evaluation",),
    ("viz",),
    ("neurons",),
    ("testbed",),
    ("training",),
    ("studies",),
    ("train", "commands", "__main__"),
)


# The wheel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where wheel and source archive are, built from a copy with no network and no build folder in the repository."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(PACKAGE, source / "register_adapter", ignore=ignored)
    # Folders that must stay out of the wheel although they lie beside the package.
    for name in ("tests", "benchmarks", "docs", "examples", "scripts"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source / path.name)
    run_script_alone("build_distributions", cwd=source)
    return source / "out"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


@pytest.mark.slow
def test_the_source_archive_holds_what_its_tests_and_documents_read(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {path.name for path in built.parent.iterdir() if path.is_file()}
    for folder in ("tests", "benchmarks", "docs", "examples", "scripts", "register_adapter"):
        wanted |= {path.relative_to(built.parent).as_posix() for path in (built.parent / folder).rglob("*.*")}
    assert not wanted - names
    assert not [name for name in names if name.endswith(".pyc")]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert sources <= names
    assert "register_adapter/py.typed" in names
    weights = {
        path.relative_to(ROOT).as_posix()
        for folder in ("testbed/weights", "testbed/grown/weights")
        for path in (PACKAGE / folder).rglob("*")
        if path.is_file()
    }
    assert weights <= names
    rest = {name for name in names - sources - weights if ".dist-info/" not in name}
    assert rest == {f"register_adapter/{name}" for name in ("py.typed", "viz/page/page.css", "viz/page/page.js")}


@pytest.mark.slow
def test_the_wheel_is_small_and_has_no_pickle(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pyc"))]
    assert sum(item.file_size for item in wheel.infolist() if "/weights/" in item.filename) <= 2 * 4 * 2**20
    assert sum(item.file_size for item in wheel.infolist() if "/weights/" not in item.filename) < 2.5 * 2**20


@pytest.mark.slow
def test_the_wheels_metadata(wheel: zipfile.ZipFile) -> None:
    folder = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == register_adapter.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.partition(">")[0].strip().replace("_", "-") for line in required} >= CORE
    assert "register_adapter.commands.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    licence = wheel.read(f"{folder}/licenses/LICENSE").decode()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_what_is_optional_is_not_a_core_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    core = {line.partition(">")[0].strip().replace("_", "-") for line in project["dependencies"]}
    assert core == CORE | {"filelock", "numpy", "pillow", "pyyaml", "tqdm"}
    optional = " ".join(project["optional-dependencies"]["demo"] + project["optional-dependencies"]["test"])
    assert "register-adapter[" in optional


def test_the_citation_names_this_version() -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == register_adapter.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert citation["references"][0]["title"] == "Vision Transformers Need Registers"


def test_every_pin_is_one_exact_version() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(pin.specifier and all(clause.operator == "==" for clause in pin.specifier) for pin in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [line for extra in project["optional-dependencies"].values() for line in extra] + project["dependencies"]
    pinned = {pin.name.replace("_", "-") for pin in pins}
    for requirement in map(Requirement, wanted):
        name = requirement.name.replace("_", "-")
        assert name == "register-adapter" or name in pinned, f"constraints.txt does not pin {name}"
        for pin in pins:
            if pin.name.replace("_", "-") == name:
                version = next(iter(pin.specifier)).version
                assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


# What an import does


@pytest.mark.slow
def test_an_import_registers_with_peft_and_does_nothing_else(tmp_path: Path) -> None:
    done = run_script("import_changes_nothing", cwd=tmp_path)
    assert done.stdout + done.stderr == "as before\n", "the import printed or logged something"


@pytest.mark.slow
def test_the_library_needs_no_extra(tmp_path: Path) -> None:
    """Every module but the command line is imported in a process that has none of the optional packages."""
    missing = ("matplotlib", "onnx", "onnxscript", "open_clip", "rich", "skimage", "sklearn", "tensorboard")
    missing += ("timm", "torchvision", "typer")
    if transformers.__version__.startswith("4."):  # its Trainer imports what it finds installed
        missing = tuple(name for name in missing if name != "sklearn")
    names = [name for name in MODULES if not name.startswith("register_adapter.commands")]
    assert "imported" in run_script("import_without_extras", ",".join(missing), *names, cwd=tmp_path).stdout.split()


# Names and docstrings


def test_every_module_has_a_docstring_and_lists_its_public_names() -> None:
    modules = {name: importlib.import_module(name) for name in MODULES}
    assert [name for name, module in modules.items() if not (module.__doc__ or "").strip()] == []
    assert [name for name, module in modules.items() if not _public(module)] == []


def test_every_public_name_has_a_docstring() -> None:
    modules = [importlib.import_module(name) for name in MODULES]
    values = [getattr(module, symbol) for module in modules for symbol in _public(module)]
    described = [value for value in values if inspect.isclass(value) or inspect.isroutine(value)]
    own = [value for value in described if value.__module__.startswith("register_adapter")]
    members = [member for value in own for member in _methods(value)]
    assert [value.__qualname__ for value in [*own, *members] if not (inspect.getdoc(value) or "").strip()] == []


def _public(module: ModuleType) -> list[str]:
    return list(getattr(module, "__all__", []))


def _methods(value: Any) -> list[Any]:
    if not inspect.isclass(value):
        return []
    own = [member for name, member in vars(value).items() if not name.startswith("_")]
    functions = [member.fget if isinstance(member, property) else getattr(member, "__func__", member) for member in own]
    return [member for member in functions if inspect.isfunction(member)]


def test_the_packages_public_names_exist_and_are_sorted() -> None:
    names = register_adapter.__all__
    assert len(names) == len(set(names))
    assert all(hasattr(register_adapter, name) for name in names)


# Layers


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions, as names below the package."""
    here = path.relative_to(ROOT).with_suffix("").parts
    package = here if path.name == "__init__.py" else here[:-1]
    package = package[:-1] if path.name == "__init__.py" else package
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            # `from . import name` may import a module.
            targets = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        else:
            continue
        imported |= {target for target in targets if target in MODULES}
    return {target.removeprefix("register_adapter.") for target in imported}


@functools.cache
def _graph() -> dict[str, set[str]]:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: _imports(path) for name, path in zip(names, paths, strict=True)}


def test_a_lower_layer_never_imports_a_higher_one() -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    graph = _graph()
    unplaced = {name.partition(".")[0] for name in graph} - set(level)
    assert not unplaced, f"put {sorted(unplaced)} into LAYERS and into docs/architecture.md"
    for name, targets in graph.items():
        for target in targets:
            mine, theirs = (level[module.partition(".")[0]] for module in (name, target))
            assert theirs <= mine, f"{name} imports {target}, which is in a higher layer"


def test_no_module_has_the_name_of_what_it_defines() -> None:
    """A face would hand on the one or the other, depending on the order of its imports."""
    definitions = (ast.FunctionDef, ast.ClassDef)
    for path in PACKAGE.rglob("*.py"):
        body = ast.parse(path.read_text("utf-8")).body
        assert path.stem not in {node.name for node in body if isinstance(node, definitions)}, path.name


def test_a_folder_has_at_most_sixteen_files_and_the_root_five() -> None:
    counts = {
        folder: sum(path.is_file() for path in folder.iterdir()) for folder in {p.parent for p in PACKAGE.rglob("*.py")}
    }
    assert counts.pop(PACKAGE) == 5
    assert max(counts.values()) <= 16, counts


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: set(targets) for name, targets in _graph().items()}
    # A package's __init__ only gathers its modules' names.
    graph = {
        name: {t for t in targets if t not in {n.rpartition(".")[0] for n in graph}} for name, targets in graph.items()
    }
    while free := [name for name, targets in graph.items() if not targets & set(graph)]:
        for name in free:
            del graph[name]
    assert not graph, f"a circle among {sorted(graph)}"


def test_the_imports_are_found() -> None:
    """The two tests above would pass on an empty graph."""
    graph = _graph()
    assert {"towers.tower", "tuner.config", "tuner.registers", "tuner.undo"} <= graph["tuner.layer"]
    assert {"towers.tower", "features.trace"} <= graph["artifacts.norms"]
    assert graph["errors"] == set()


def test_the_architecture_document_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    names = {name.partition(".")[0] for name in _graph()}
    missing = [name for name in names if f"`{name}" not in text]
    assert not missing, f"docs/architecture.md does not mention {sorted(missing)}"
