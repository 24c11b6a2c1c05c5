"""Read the imports of a package from its syntax trees, and find import cycles."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One import of one file."""

    module: str  # the importing module, relative to the package, which is ""
    target: str  # absolute dotted name, of a module if the package has one
    line: int
    eager: bool  # runs when the module is imported
    sibling: bool  # the form is `from .name import ...`


def modules_of(root: Path) -> dict[str, Path]:
    """Return the files of a package by dotted name. The package itself is ""."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def walk(node: ast.AST, eager: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield every import below `node`, and `True` if it runs at import time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, eager
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, eager=False)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from walk(child, eager=False)
        else:
            yield from walk(child, eager)


def imports_of(root: Path) -> Iterator[Import]:
    """Yield the imports of every file of the package."""
    modules, package = modules_of(root), root.name
    known = {f"{package}.{name}".rstrip(".") for name in modules}
    for module, path in modules.items():
        parents = [package, *filter(None, module.split("."))]
        if path.name != "__init__.py":
            parents.pop()
        for node, eager in walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets, sibling = [alias.name for alias in node.names], False
            else:
                up = parents[: len(parents) - node.level + 1] if node.level else []
                base = ".".join([*up, *filter(None, [node.module])])
                targets = [f"{base}.{alias.name}" for alias in node.names]
                sibling = node.level == 1 and bool(node.module) and "." not in node.module
                if base in known:
                    # a name that is not a module counts as an import of its module
                    targets = [t if t in known or base == package else base for t in targets]
            for target in dict.fromkeys(targets):
                yield Import(module, target, node.lineno, eager, sibling)


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """Return the import cycles of a graph of modules, each as `a -> b -> a`."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(edges.get(module, ())):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found
