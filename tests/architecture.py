"""Measures of the architecture, read off the source of `ejk/`: imports, sizes, annotations.

python tests/architecture.py                the numbers, and what stands behind them
python tests/architecture.py ../before      of another checkout
"""

import ast
import graphlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
LONG_FUNCTION, LONG_MODULE = 60, 300
# A backend that hands part of its work to another's kernels.
BUILDS_ON = {"ejk.backends.mosaic_gpu": "ejk.backends.triton"}
# What each backend may use, and what uses all of them.
SHARED, REVERSE_MODE = "ejk.backends", "ejk.backends.reverse_mode"
# What is tested with, of all of `ejk` and of other backends; only commands build on it.
TESTING, COMMANDS = "ejk.testing", ("ejk.cli", "ejk.__main__")
# What runs on the host, with NumPy alone.
HOSTS = ("ejk.paging", "ejk.testing.oracle")


class Import(NamedTuple):
    """One name that one module takes from another."""

    importer: str
    module: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.name or 'all'} of {self.module}"


class Package:
    """The modules of `ejk/` by their dotted names, and what is measured of them."""

    def __init__(self, root: pathlib.Path = ROOT):
        self.paths, self.lines, self.trees = {}, {}, {}
        self.folders = set()
        for path in sorted((root / "ejk").rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            if path.name == "__init__.py":
                name = name.removesuffix(".__init__")
                self.folders.add(name)
            text = path.read_text(encoding="utf-8")
            self.paths[name] = path.relative_to(root)
            self.lines[name] = text.count("\n")
            self.trees[name] = ast.parse(text)
        self.imports = [found for name in self.trees for found in self._imports(name)]
        self.uses = {name: set[str]() for name in self.trees}
        for found in self.imports:
            if found.importer != "ejk":
                self.uses[found.importer].add(found.module)

    def _imports(self, importer: str) -> Iterator[Import]:
        for node in ast.walk(self.trees[importer]):
            if isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = f"{'.' * node.level}{node.module or ''}"
                if node.level:
                    folder = importer if importer in self.folders else importer.rpartition(".")[0]
                    module = importlib.util.resolve_name(module, folder)
                names = [(module, alias.name) for alias in node.names]
            else:
                continue
            for module, name in names:
                if f"{module}.{name}" in self.trees:
                    yield Import(importer, f"{module}.{name}", "", node.lineno)
                elif module in self.trees:
                    yield Import(importer, module, name, node.lineno)

    def floor(self, module: str) -> int:
        """0: knows no operation; 1: an operation; 2: a backend; 3: reverse mode; 4: public.

        5: testing; 6: commands.
        """
        if module.startswith(COMMANDS):
            return 6
        if module.startswith(TESTING):
            return 5
        if module.startswith(REVERSE_MODE):
            return 3
        if self.backend(module):
            return 2
        if module.startswith(SHARED):
            return 1
        return 4 if module == "ejk" or self._reaches_backends(module, set()) else 0

    def backend(self, module: str) -> str | None:
        """The folder of `ejk/backends` that a module lies in; its files are of every backend."""
        folder = ".".join(module.split(".")[:3])
        inside = folder.startswith(f"{SHARED}.") and folder != REVERSE_MODE
        return folder if inside and folder in self.folders else None

    def _reaches_backends(self, module: str, seen: set[str]) -> bool:
        seen.add(module)
        return any(
            used.startswith(SHARED) or (used not in seen and self._reaches_backends(used, seen))
            for used in self.uses[module]
        )

    def turning_back(self) -> list[str]:
        """Imports of a floor above, or of another backend that it does not build on."""
        floors = {module: self.floor(module) for module in self.trees}
        found = []
        for use in self.imports:
            above = floors[use.module] > floors[use.importer]
            backends = self.backend(use.importer), self.backend(use.module)
            if above or (
                all(backends) and backends[1] not in (backends[0], BUILDS_ON.get(backends[0]))
            ):
                found.append(str(use))
        return found

    def beyond_the_host(self) -> list[str]:
        """Imports of the page manager and the oracle that are not theirs, Python's or NumPy."""
        found = []
        for importer in self.trees:
            for host in (x for x in HOSTS if importer == x or importer.startswith(f"{x}.")):
                for node in ast.walk(self.trees[importer]):
                    if isinstance(node, ast.Import):
                        modules = [alias.name for alias in node.names]
                    elif isinstance(node, ast.ImportFrom):
                        modules = [f"{'.' * node.level}{node.module or ''}"]
                    else:
                        continue
                    found += [
                        f"{importer}:{node.lineno} imports {module}"
                        for module in modules
                        if not module.startswith(host)
                        and module.split(".")[0] not in sys.stdlib_module_names | {"numpy"}
                    ]
        return found

    def cycles(self) -> list[str]:
        try:
            graphlib.TopologicalSorter(self.uses).prepare()
        except graphlib.CycleError as error:
            return [" -> ".join(error.args[1])]
        return []

    def private_names(self) -> list[str]:
        """Names that another module keeps to itself, imported or read off it."""
        found = [str(x) for x in self.imports if x.name.startswith("_") and x.name[1] != "_"]
        for importer, tree in self.trees.items():
            modules = {
                alias.asname or alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
                if f"{node.module}.{alias.name}" in self.trees
            }
            for node in ast.walk(tree):
                match node:
                    case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner in modules:
                        if name.startswith("_") and not name.startswith("__"):
                            found.append(f"{importer}:{node.lineno} reads {owner}.{name}")
        return found

    def long_functions(self) -> list[str]:
        """Functions that are no kernels; neither a docstring nor a decorator counts."""
        return [
            f"{module}.{node.name}: {length(node)} lines"
            for module, node in self._functions()
            if length(node) > LONG_FUNCTION
        ]

    def untyped_parameters(self) -> list[str]:
        found = []
        for module, node in self._functions():
            of = node.args
            named = [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg]
            for parameter in filter(None, named):
                if parameter.annotation is None and parameter.arg not in ("self", "cls"):
                    found.append(f"{module}:{node.lineno} {node.name}({parameter.arg})")
        return found

    def _functions(self) -> Iterator[tuple[str, ast.FunctionDef]]:
        for module, tree in self.trees.items():
            if not module.endswith("kernel"):
                for node in ast.walk(tree):
                    if isinstance(node, ast.FunctionDef) and not is_kernel(node):
                        yield module, node

    def long_modules(self) -> list[str]:
        return [f"{self.paths[m]}: {n} lines" for m, n in self.lines.items() if n > LONG_MODULE]


def is_kernel(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


def length(node: ast.FunctionDef) -> int:
    first = node.body[0]
    docstring = ast.get_docstring(node, clean=False) is not None
    spared = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return (node.end_lineno or 0) - node.lineno + 1 - spared


class Budget(NamedTuple):
    """What is counted, and how many there may be."""

    title: str
    offenders: list[str]
    at_most: int


def budgets(package: Package) -> list[Budget]:
    return [
        Budget("imports that turn back", package.turning_back(), 0),
        Budget("cycles of imports", package.cycles(), 0),
        Budget("imports of the page manager and the oracle", package.beyond_the_host(), 0),
        Budget("private names of other modules", package.private_names(), 0),
        Budget(f"functions over {LONG_FUNCTION} lines, no kernels", package.long_functions(), 0),
        Budget("parameters without a type, kernels aside", package.untyped_parameters(), 0),
        Budget(f"modules over {LONG_MODULE} lines", package.long_modules(), 3),
    ]


def main() -> None:
    package = Package(pathlib.Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT)
    found = budgets(package)
    for budget in found:
        print(f"\n{budget.title}:", *budget.offenders, sep="\n  ")
    print(f"\n{sum(package.lines.values()):6,}  lines in {len(package.lines)} modules")
    for budget in found:
        print(f"{len(budget.offenders):6,}  {budget.title}, at most {budget.at_most}")


if __name__ == "__main__":
    main()
