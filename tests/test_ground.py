"""Structure: pins, which modules know Ray, which way imports run, no calls that run what they read.

Text (ASCII, paths, sizes) is checked by lint_text.py.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "raylivecell"
ROOMS = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in ROOMS.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

RAY_ROOMS = {
    "runtime",
    "ray_errors",
    "ingest",
    "dataset",
    "execution",
    "blocks",
    "prepare",
    "train",
    "trainer",
    "job",
    "worker",
    "evaluate",
    "predict",
    "actors",
    "sweep",
    "confirm",
    "search",
    "trial",
    "tuner",
    "preflight",
    "probe",
    "check",
    "submit",
    "gauges",
    "gloo",
    "messages",
    "data_settings",
    "ray_internals",
}
RAY_ROOMS |= {"bench_feed", "bench_frames", "bench_train", "bench_prepare", "bench_scale", "bench_startup"}
"""R in DESIGN.md; `trainer`, `job` and `worker` are parts of train (Ray Train, what it is told, what runs in its
processes), `execution` what ingest has Ray Data execute, `dataset` what a driver opens for it, `actors` a part of
evaluate and predict, `trial` and `search` of sweep."""
TOP_ROOMS = {"cli", "commands", "__main__", "demo", "bench"}
"""They call the others; nothing imports them."""


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    by_name = {canonicalize_name(pin.name): pin for pin in found}
    assert len(by_name) == len(found), "a package is pinned twice"
    return by_name


def version_of(pin: Requirement) -> str:
    (one,) = pin.specifier
    assert one.operator == "==", f"{pin} is no exact pin"
    return one.version


def imports(tree: ast.AST, lazy: bool = True) -> set[str]:
    """Dotted names that a file imports; without those inside functions unless `lazy`; never those for types alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def knows_ray(names: set[str]) -> bool:
    return any(name.split(".")[0] == "ray" for name in names)


def rooms_in(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "raylivecell" and len(part) > 1 and part[1] in ROOMS}


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned, extras = pins(), PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["dev"]]:
        wanted = Requirement(line)
        pin = pinned.get(canonicalize_name(wanted.name))
        assert pin is not None, f"{wanted.name} is not in constraints.txt"
        assert wanted.specifier.contains(version_of(pin), prereleases=True), f"{pin} is outside {wanted}"


def test_pins_hold_on_every_machine() -> None:
    """No build of one machine (+cpu), no address, and a marker only where a release leaves Python 3.10 out."""
    for name, pin in pins().items():
        assert "+" not in version_of(pin), f"{pin} is a local build"
        assert pin.url is None, name
        for python in ("3.11", "3.12", "3.13"):
            assert pin.marker is None or pin.marker.evaluate({"python_version": python}), f"{pin} not on {python}"
    assert version_of(pins()["torch"]) == "2.13.0"


def test_only_r_rooms_import_ray() -> None:
    knowing = {name for name, tree in TREES.items() if knows_ray(imports(tree))}
    assert knowing <= RAY_ROOMS | {"cli"}, f"{sorted(knowing - RAY_ROOMS)} import ray"
    assert not knows_ray(imports(TREES["cli"], lazy=False)), "cli imports ray before it must"


def test_plain_rooms_import_no_r_room() -> None:
    """Else a test of a plain function would pay for Ray."""
    for name in set(ROOMS) - RAY_ROOMS - TOP_ROOMS:
        assert not rooms_in(imports(TREES[name])) & RAY_ROOMS, f"{name} imports a room that imports ray"


def test_imports_run_downward() -> None:
    """No room imports itself by way of others, not even lazily, and none imports the rooms at the top."""
    below = {name: rooms_in(imports(tree)) - {"__init__"} for name, tree in TREES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(below[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in ROOMS:
        visit(name, ())
        assert not below[name] & TOP_ROOMS or name in TOP_ROOMS, f"{name} imports a room at the top"


def unsafe(node: ast.Call) -> str | None:
    """Why a call could run what it reads, or None."""
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if re.fullmatch(r"(pickle|cloudpickle|marshal|dill|joblib)\.(load|loads|Unpickler)", called):
        return "unpickles"
    if called in {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
        return "runs or builds anything"
    if called == "torch.load" and given.get("weights_only") != "True":
        return "unpickles unless weights_only=True"
    if given.get("weights_only") == "False" or given.get("allow_pickle") == "True":
        return "unpickles"
    return "runs a shell" if given.get("shell") == "True" else None


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_no_unsafe_calls() -> None:
    for path in [*ROOMS.values(), *sorted((ROOT / "jobs").glob("*.py"))]:
        for call in calls(ast.parse(path.read_text())):
            assert not unsafe(call), f"{path.name}:{call.lineno}: {ast.unparse(call)[:60]} {unsafe(call)}"


@pytest.mark.parametrize(
    "code",
    [
        "pickle.loads(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "yaml.load(x, Loader=y)",
        "subprocess.run(x, shell=True)",
        "np.load(x, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_unsafe_calls_are_seen(code: str) -> None:
    assert unsafe(next(calls(ast.parse(code))))


@pytest.mark.parametrize("code", ["torch.load(x, weights_only=True)", "yaml.safe_load(x)", "model.eval()"])
def test_safe_calls_pass(code: str) -> None:
    assert not unsafe(next(calls(ast.parse(code))))
