"""The house rules on size and names: functions, files, class names and import circles."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_FUNCTION = 60  # lines; options of a command are counted by its decorators' end
LONGEST_FILE = 400


@cache
def sources():
    """Return the syntax tree of every product file, by its path from the root."""
    folders = ("trainkit", "export", "serve", "bench")
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def module_name(path):
    """Return the name under which a file is imported."""
    parts = list(path.with_suffix("").parts)
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "trainkit" else ["trainkit", *parts])


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len((ROOT / path).read_bytes().splitlines()) for path in sources()}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_function_is_longer_than_60_lines():
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [
        (str(path), node.name, node.end_lineno - node.lineno + 1)
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]
    assert [found for found in functions if found[2] > LONGEST_FUNCTION] == []


def test_a_class_name_stands_for_one_thing():
    places = defaultdict(list)
    for path, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_module_imports_itself_through_others():
    names = {module_name(path): tree for path, tree in sources().items()}
    imports = {name: imported(tree, names) - {name} for name, tree in names.items()}
    # What imports nothing that is left cannot be part of a circle.
    while leaves := {name for name, found in imports.items() if not found}:
        imports = {name: found - leaves for name, found in imports.items() if name not in leaves}
    # What nothing imports neither.
    while roots := set(imports) - set().union(*imports.values(), ()):
        imports = {name: found for name, found in imports.items() if name not in roots}
    assert imports == {}


def imported(tree, names):
    """Return the product modules that a module imports when it is imported itself."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(names) or {node.module}
    return found & set(names)


def test_the_circle_check_finds_a_circle():
    names = {"a": ast.parse("import b"), "b": ast.parse("from a import x"), "c": ast.parse("")}
    assert imported(names["b"], names) == {"a"}
    assert imported(names["a"], names) == {"b"}
