"""The rooms of luqrun/: each folder is one, and each loose file. Imports point downwards, and never in a circle."""

import ast
from pathlib import Path

import luqrun

PACKAGE = Path(luqrun.__file__).parent
ORDER = "errors internals quant config recipes __init__ runtime runs tasks cost train cli __main__ report bench".split()  # noqa: SIM905


def modules():
    """By dotted name below luqrun, the files; a package is called as its folder, luqrun itself __init__."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(parts)] = path
    return found


def imported():
    """By module, the modules that it imports anywhere, in functions and for annotations too."""
    known, found = modules(), {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "luqrun":
                for each in node.names:
                    full = f"{node.module}.{each.name}".removeprefix("luqrun.")
                    found[name].add(full if full in known else full.rpartition(".")[0] or "__init__")
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are absolute"
        found[name].discard(name)
    return found


def room(module):
    return module.partition(".")[0]


def test_imports_point_downwards():
    upwards = {
        (module, other)
        for module, others in imported().items()
        for other in others
        if ORDER.index(room(other)) > ORDER.index(room(module))
    }
    assert not upwards


def test_there_are_few_rooms_and_arrows():
    arrows = {(room(module), room(other)) for module, others in imported().items() for other in others}
    arrows = {(one, other) for one, other in arrows if one != other}
    assert {room(module) for module in modules()} == set(ORDER)
    assert len(ORDER) <= 16
    assert len(arrows) <= 60


def test_no_modules_import_each_other_in_a_circle():
    left = imported()
    while True:
        free = [module for module, others in left.items() if not others & left.keys()]
        if not free:
            break
        for module in free:
            del left[module]
    assert not left


def test_the_library_knows_nothing_of_the_runner():
    allowed = {"errors", "internals", "quant"}
    used = {room(other) for module, others in imported().items() if room(module) == "quant" for other in others}
    assert used <= allowed
    for path in (PACKAGE / "quant").rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & {"hydra", "omegaconf", "yaml"}, path
