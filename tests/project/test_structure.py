"""Structure: pinned dependencies, no calls that may execute data, 3 to 16 modules per package.

Which package may import which, and which may import Ray, is checked by import-linter (pyproject.toml, `make lint`);
text (ASCII, paths, sizes, words) by lint_text.py.
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

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "raylivecell"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    by_name = {canonicalize_name(pin.name): pin for pin in pins}
    assert len(by_name) == len(pins), "a package is pinned twice"
    return by_name


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", f"{pin} is not an exact pin"
    return specifier.version


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned, extras = pins(), PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["dev"]]:
        requirement = Requirement(line)
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version_of(pin), prereleases=True), f"{pin} is outside {requirement}"


def test_pins_are_valid_on_every_machine() -> None:
    """No local build (+cpu), no URL, and a marker only for a release that does not support Python 3.10."""
    for name, pin in pins().items():
        assert "+" not in version_of(pin), f"{pin} is a local build"
        assert pin.url is None, name
        for python in ("3.11", "3.12", "3.13"):
            assert pin.marker is None or pin.marker.evaluate({"python_version": python}), f"{pin} not on {python}"
    assert version_of(pins()["torch"]) == "2.13.0"


def unsafe(node: ast.Call) -> str | None:
    """Why a call could execute the data it reads; None if it could not."""
    function = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if re.fullmatch(r"(pickle|cloudpickle|marshal|dill|joblib)\.(load|loads|Unpickler)", function):
        return "unpickles"
    if function in {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}:
        return "executes or constructs anything"
    if function == "torch.load" and keywords.get("weights_only") != "True":
        return "unpickles unless weights_only=True"
    if keywords.get("weights_only") == "False" or keywords.get("allow_pickle") == "True":
        return "unpickles"
    return "runs a shell" if keywords.get("shell") == "True" else None


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_no_unsafe_calls() -> None:
    for path in [*MODULES, *sorted((ROOT / "jobs").glob("*.py"))]:
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
def test_unsafe_calls_are_detected(code: str) -> None:
    assert unsafe(next(calls(ast.parse(code))))


@pytest.mark.parametrize("code", ["torch.load(x, weights_only=True)", "yaml.safe_load(x)", "model.eval()"])
def test_safe_calls_pass(code: str) -> None:
    assert not unsafe(next(calls(ast.parse(code))))


def test_a_package_has_3_to_16_modules_listed_in_its_docstring() -> None:
    for package in sorted({path.parent for path in MODULES} - {PACKAGE}):
        modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
        assert 3 <= len(modules) <= 16, f"{package.name} has {len(modules)} modules"
        tree = ast.parse((package / "__init__.py").read_text())
        assert len(tree.body) == 1, f"{package.name}/__init__.py contains more than its docstring"
        listed = set(re.findall(r"\w+", ast.get_docstring(tree) or ""))
        assert modules <= listed, f"{package.name}/__init__.py does not list {sorted(modules - listed)}"
