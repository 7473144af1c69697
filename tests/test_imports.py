"""One way through the house: no import circle, and the core stands without what is built on it."""

import ast
import re
from pathlib import Path

import lmp_triton
from lmp_triton import kernels, perf

PACKAGE = Path(lmp_triton.__file__).parent
BESIDE = {"kernels": Path(kernels.__file__).parent, "perf": Path(perf.__file__).parent}

ON_TOP = ("cli", "demo", "examples", "info", "integrations", "perf", "segmentation")
"""What is built on the core, or joins it to what is."""


def modules():
    """Name to file of every module: `lmp_triton.eager` is "eager"."""
    found = {}
    for folder, prefix in ((PACKAGE, ()), *((folder, (name,)) for name, folder in BESIDE.items())):
        for file in folder.rglob("*.py"):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name, file, known):
    """The modules of this package that one names anywhere in its code, also inside functions."""
    here = ["lmp_triton", *name.split(".")] if name else ["lmp_triton"]
    package = here if file.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            targets = [(base, alias.name) for alias in node.names]
        for base, member in targets:
            if base.split(".")[0] != "lmp_triton":
                continue
            base = base.removeprefix("lmp_triton").removeprefix(".")
            inner = f"{base}.{member}".removeprefix(".")
            target = inner if member and inner in known else base
            if target != name and target in known:
                yield target


def graph():
    known = modules()
    return {name: set(imports(name, file, known)) for name, file in known.items()}


def circles(graph):
    """Modules that lead back to themselves: what is left when those that import nothing left are taken away."""
    left = dict(graph)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return left


def test_no_circle():
    everything = graph()
    assert len(everything) > 40 and everything["fused"] and everything["kernels.select"]
    assert not circles(everything)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})  # it would be found


def test_the_core_stands_alone():
    def on_top(name):
        return name.split(".")[0] in ON_TOP

    for name, targets in graph().items():
        if not on_top(name):
            assert not any(map(on_top, targets)), (name, targets)


def test_layers():
    """settings, types ← eager, kernels ← fused ← operators ← dispatch ← autograd ← api ← modules."""
    order = ["types", "settings", "kernels", "eager", "fused", "operators", "dispatch", "autograd", "api", "modules"]
    everything = graph()
    place = {name: order.index(name.split(".")[0]) for name in everything if name.split(".")[0] in order}
    for name in place:
        for target in everything[name] & place.keys():
            assert place[target] <= place[name], f"{name} imports {target}"
    assert not everything["types"] and not everything["settings"]
    assert "autograd" not in {x for name in everything if name.startswith("kernels") for x in everything[name]}


def test_no_module_is_named_like_what_is_in_it():
    """Whoever imports both would have to rename one."""
    for name, file in modules().items():
        if not name.startswith("examples"):  # each is a page, run and imported whole
            defined = [node.name for node in ast.parse(file.read_text()).body if hasattr(node, "name")]
            assert file.stem not in defined, name


def test_whether_a_graph_is_made_is_asked_in_one_place():
    """Of torch.compiler and of its modes: `settings` alone knows the questions."""
    asking = {
        file.stem for file in PACKAGE.glob("*.py") if re.search(r"torch\.compiler\.|_dispatch_mode", file.read_text())
    }
    assert asking == {"settings"}
