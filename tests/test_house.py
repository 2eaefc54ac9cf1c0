"""The house: which room may import which, and which library belongs to one room, read from the source with `ast`."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import medusa_ds

PACKAGE = Path(medusa_ds.__file__).parent
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.name != "__init__.py"
}
LAYERS = [
    {"errors", "files", "progress", "ranks"},
    {"config"},
    {"data", "model"},
    {"heads"},
    {"training", "decoding"},
    {"runs", "page"},
    {"distilling", "exporting"},
    {"benchmarks"},
    {"programs"},
    {"cli", "train", "__main__"},
]
"""Rooms, and modules of the top, from the foundation up: each may import what stands above it in this list."""
KEEPERS = {"deepspeed": {"training"}, "liger_kernel": {"model", "benchmarks"}, "vllm": set()}
"""Libraries that one room alone may know."""


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
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                found.extend((name, inside) for name in names)
            visit(child, inside)

    visit(ast.parse(file.read_text()), False)
    return found


def ours(name: str) -> str | None:
    """The module of this package that an import names, or None."""
    if not name.startswith("medusa_ds."):
        return None
    inner = name.removeprefix("medusa_ds.")
    while inner not in MODULES and "." in inner:
        inner = inner.rpartition(".")[0]
    return inner


def layer(module: str) -> int:
    return next(n for n, rooms in enumerate(LAYERS) if module.split(".")[0] in rooms)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_layers(module):
    """Mutation: import `medusa_ds.training` in `model/loss.py`, or a program in another one."""
    room = module.split(".")[0]
    for name, late in imports(MODULES[module]):
        inner = ours(name)
        if inner is not None and inner in MODULES:
            same_room = inner.split(".")[0] == room and room != "programs"
            foundation = layer(module) == layer(inner) == 0
            assert same_room or foundation or layer(inner) < layer(module), f"{module} imports {name}"
            if room == "cli" and layer(inner) > 1:
                assert late, f"cli imports {name} before its subcommand is called"
        library = name.split(".")[0]
        assert room in KEEPERS.get(library, {room}), f"{module} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
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
def test_file_holds_one_subject(module):
    assert len(MODULES[module].read_text().splitlines()) <= 600


def test_heavy_libraries_wait_for_their_command():
    """`medusa-ds list`, `show` and mistakes in a recipe need no torch. Mutation: import a program atop `cli.py`."""
    code = (
        "import sys; from medusa_ds.cli import main; main(['list']); main(['show', 'llama3_8b_stage2'])\n"
        "try: main(['validate', 'smollm2_135m_stage1', 'stage=3'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'numpy'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "smollm2_135m_stage1" in done.stdout


def test_compiler_of_pytorch_waits_for_what_it_compiles():
    """Mutation: compile a function at import."""
    code = "import sys, medusa_ds.programs.evaluate; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_every_import_is_a_dependency_with_a_lower_bound():
    """Mutation: import a package that another one happens to bring, or write a requirement without a version."""
    setup = ast.parse((PACKAGE.parent / "setup.py").read_text())
    call = next(node for node in ast.walk(setup) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    required = [*ast.literal_eval(given["install_requires"]), *ast.literal_eval(given["extras_require"])["distill"]]
    assert [text for text in required if ">=" not in text] == []
    names = {text.split(">=")[0] for text in required}
    found = {name.split(".")[0] for file in MODULES.values() for name, _ in imports(file)}
    others = found - {"medusa_ds", "__future__"} - sys.stdlib_module_names
    assert len(others) > 15
    owners = packages_distributions()
    missing = [
        name
        for name in others
        if not {d.lower().replace("_", "-") for d in owners[name]} & {n.replace("_", "-") for n in names}
    ]
    assert missing == []
