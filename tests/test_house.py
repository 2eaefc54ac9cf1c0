"""The house: which module may import which, read from the source with `ast`, and how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import medusa_ds

PACKAGE = Path(medusa_ds.__file__).parent
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.name != "__init__.py"
}
FOUNDATION = {"errors", "arguments", "config_files", "ds_config", "recipe", "recipe_files", "recipe_sections"}
COMMAND = {"cli", "__main__"}
PROGRAMS = {name for name in MODULES if "." not in name} - FOUNDATION - COMMAND
ROOMS = ("data", "model", "training", "decoding", "distilling", "benchmark")

# room or module: what of ours it may import, besides its own room
ALLOWED = {
    "errors": set(),
    "arguments": {"errors"},
    "config_files": {"errors"},
    "ds_config": {"errors", "config_files"},
    "recipe_sections": set(),
    "recipe_files": {"errors", "config_files"},
    "recipe": FOUNDATION,
    "data": FOUNDATION,
    "model": FOUNDATION,
    "training": {*FOUNDATION, "model", "data"},
    "decoding": {*FOUNDATION, "model"},
    "distilling": {*FOUNDATION, "decoding"},
    "benchmark": {*FOUNDATION, *ROOMS},
    "program": {*FOUNDATION, *ROOMS},
    "__main__": {"train"},
    "cli": {*FOUNDATION, *PROGRAMS, "decoding"},  # whose settings it fills in for the programs
}
# libraries that one place alone may know, by the first part of the import
KEEPERS = {
    "deepspeed": {"training.engine", "training.launch"},
    "liger_kernel": {"model.loss", "model.backbone", "benchmark.original", "benchmark.head"},
}
# `transformers.X` beyond its top level: families, a model's files, the key-value cache, and HfDeepSpeedConfig
TRANSFORMERS_INTERNALS = {"model.backbone", "model.lm_head", "decoding.generator", "decoding.cache", "training.engine"}


def imports(file: Path) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, each with whether that happens inside a function or for typing alone."""
    found = []

    def visit(node: ast.AST, late: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                inside = True
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                own = child.module in ("medusa_ds", *(f"medusa_ds.{room}" for room in ROOMS))
                names = [f"{child.module}.{alias.name}" for alias in child.names] if own else [str(child.module)]
                found.extend((name, inside) for name in names)
            visit(child, inside)

    visit(ast.parse(file.read_text()), False)
    return found


def ours(name: str) -> str | None:
    """The module of this package that an import names, or None."""
    if not name.startswith("medusa_ds."):
        return None
    inner = name.removeprefix("medusa_ds.")
    return inner if inner in MODULES else inner.rpartition(".")[0]


def room(module: str) -> str:
    if "." in module:
        return module.split(".")[0]
    return "program" if module in PROGRAMS else module


@pytest.mark.parametrize("module", MODULES)
def test_imports_keep_to_the_table(module: str) -> None:
    """Mutation: import `medusa_ds.training` in `model/heads.py`, or a program in another one."""
    here = room(module)
    for name, late in imports(MODULES[module]):
        inner = ours(name)
        if inner is not None:
            target = inner if room(inner) == "program" else room(inner)
            same = here in ROOMS and room(inner) == here
            assert same or target in ALLOWED[here], f"{module} imports {name}"
            if here == "cli" and target not in FOUNDATION:
                assert late, f"cli imports {name} before its subcommand is called"
        library = name.split(".")[0]
        assert module in KEEPERS.get(library, {module}), f"{module} imports {name}"
        if name.startswith("transformers."):
            assert module in TRANSFORMERS_INTERNALS, f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {inner for name, _ in imports(file) if (inner := ours(name)) in MODULES}
        for module, file in MODULES.items()
    }
    done: set[str | None] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for inner in sorted(graph[module]):  # type: ignore[type-var]
                follow(inner, (*path, module))  # type: ignore[arg-type]
            done.add(module)

    for module in graph:
        follow(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_file_is_short(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 350


def test_heavy_libraries_wait_for_their_command() -> None:
    """`medusa-ds list`, `validate` and `show` import no torch. Mutation: import a program at the top of `cli.py`."""
    code = (
        "import sys; from medusa_ds.cli import main; main(['list']); main(['validate', 'smollm2_135m_stage1']); "
        "main(['show', 'llama3_8b_stage2']); heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'numpy'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "smollm2_135m_stage1" in done.stdout
