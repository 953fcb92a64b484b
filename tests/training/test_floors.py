"""Imports run one way: the project has seven floors, and nothing imports from a floor above its own."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: from the ground up; a folder stands for what is in it unless a longer name stands elsewhere
FLOORS = (
    ("featinv_nodes/core",),
    ("featinv_nodes/worlds",),
    ("training/config.py", "training/files.py", "training/report.py", "training/checksum.py"),
    ("training/models", "training/data"),
    ("training/cli.py", "training/loop", "training/concepts", "training/evaluation", "training/speed"),
    ("training/worlds",),
    ("training",),
)


def modules():
    """Dotted name -> file of everything in core, worlds and training."""
    files = [file for folder in ("featinv_nodes/core", "featinv_nodes/worlds", "training") for file in (ROOT / folder).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name, file, known):
    """The modules of ours that a module imports, wherever in it."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            yield from (result for alias in node.names if (result := f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin) in known)


def floor(file):
    path = file.relative_to(ROOT).as_posix()
    return max((len(place), number) for number, places in enumerate(FLOORS) for place in places if path == place or path.startswith(place + "/"))[1]


def test_nothing_imports_from_a_floor_above():
    known = modules()
    wrong = [f"{name} imports {other}" for name, file in known.items() for other in imports(name, file, known) if floor(known[other]) > floor(file)]
    assert not wrong and len(FLOORS) == 7


def test_programs_import_no_program():
    known = modules()
    programs = {name for name, file in known.items() if '__name__ == "__main__"' in file.read_text()}
    wrong = [f"{name} imports {other}" for name, file in known.items() for other in imports(name, file, known) if other in programs]
    assert len(programs) > 15 and not wrong


def test_core_and_worlds_know_nothing_of_training():
    known = modules()
    assert not [name for name, file in known.items() if name.startswith("featinv_nodes") and "training" in {other.split(".")[0] for other in imports(name, file, known)}]
