"""Imports run one way: packages on at most seven levels, and no program imports a program."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = 7
#: files of training/ that are libraries; all others there, and those in experiments/, are programs
LIBRARIES = ("checksum", "cli", "cli_decoder", "cli_start", "cli_untrained", "config", "files", "plots", "report")


def modules():
    """Dotted name -> file of everything in core, worlds and training, and of feature_decoders."""
    files = [
        file
        for folder in ("featinv_nodes/core", "featinv_nodes/worlds", "training")
        for file in (ROOT / folder).rglob("*.py")
    ]
    files.append(ROOT / "featinv_nodes" / "feature_decoders.py")
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name, file, known):
    """The modules of ours that a module imports, wherever in it."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            yield from (
                found
                for alias in node.names
                if (found := f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in known else origin) in known
            )
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def package_of(name):
    """The folder that a module lies in. A library file of training/ is a package of its own; the programs are one."""
    top, *rest = name.split(".")
    if top == "featinv_nodes":
        return f"featinv_nodes.{rest[0]}"
    if not rest or rest == ["experiments"]:
        return None  # the packages themselves, which import nothing
    inside = len(rest) > 1 or (ROOT / "training" / rest[0]).is_dir()
    return f"training.{rest[0]}" if (inside and rest[0] != "experiments") or rest[0] in LIBRARIES else "programs"


def test_packages_import_one_way_on_seven_levels():
    known = modules()
    below = {}
    for name, file in known.items():
        below.setdefault(package_of(name), set()).update(
            package_of(other)
            for other in imports(name, file, known)
            if package_of(other) not in (package_of(name), None)
        )

    @cache
    def level(package):
        return 1 + max(map(level, below[package]), default=0)  # recursion without end where packages import each other

    assert level("programs") == LEVELS == max(map(level, below)) and level("featinv_nodes.core") == 1


def test_programs_import_no_program():
    known = modules()
    programs = {name for name, file in known.items() if '__name__ == "__main__"' in file.read_text()}
    assert len(programs) > 15 and all(package_of(name) == "programs" for name in programs)
    assert not [
        f"{name} imports {other}"
        for name, file in known.items()
        for other in imports(name, file, known)
        if other in programs
    ]


def test_core_and_worlds_know_nothing_of_training():
    known = modules()
    assert not [
        name
        for name, file in known.items()
        if name.startswith("featinv_nodes")
        and any(other.startswith("training") for other in imports(name, file, known))
    ]
