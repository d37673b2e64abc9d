"""The Dockerfile: rules for its text, its build context, and the commands of its image, run without Docker."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
IGNORE = (ROOT / ".dockerignore").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Step(NamedTuple):
    """An instruction with the name and number of its stage."""

    stage: str
    number: int
    word: str
    rest: str


def steps(text: str) -> list[Step]:
    """Parse the instructions of a Dockerfile; those before the first FROM are in stage ''."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    instructions: list[Step] = []
    stage, number = "", -1
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(None, 1)
        if word == "FROM":
            number += 1
            stage = rest.split(" AS ")[1] if " AS " in rest else str(number)
        instructions.append(Step(stage, number, word, rest.strip()))
    return instructions


def final(text: str) -> list[Step]:
    """The instructions of the last stage, which becomes the image."""
    instructions = steps(text)
    return [step for step in instructions if step.number == instructions[-1].number]


def runs(text: str, program: str) -> Iterator[tuple[Step, str]]:
    """Each (RUN instruction, call of `program` in it)."""
    for step in steps(text):
        if step.word == "RUN":
            for command in re.split(r"&&|\|\||;", step.rest):
                if re.search(rf"(^|\s){program}\s", command):
                    yield step, command.strip()


def in_context(path: str, ignore: str) -> bool:
    """Whether .dockerignore admits `path` to the build context: the last pattern that matches it or a parent decides.

    `**/` matches any number of folders, including none.
    """
    admitted = True
    wildcards = {"**/": "(?:.*/)?", "*": "[^/]*"}
    for pattern in (line for line in ignore.splitlines() if line and not line.startswith("#")):
        tokens = re.split(r"(\*\*/|\*)", pattern.removeprefix("!"))
        regex = "".join(wildcards.get(token, re.escape(token)) for token in tokens)
        if re.fullmatch(f"{regex}(/.*)?", path):
            admitted = pattern.startswith("!")
    return admitted


def copied_files(source: str, ignore: str) -> list[str]:
    """The files of the project that `COPY source` copies."""
    path = ROOT / source
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return [name for file in files if in_context(name := file.relative_to(ROOT).as_posix(), ignore)]


def base_images_are_pinned(text: str) -> Iterator[str]:
    stages: set[str] = set()
    defaults = dict(step.rest.split("=", 1) for step in steps(text) if step.word == "ARG" and not step.stage)
    for step in (step for step in steps(text) if step.word == "FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda name: defaults.get(name[1], ""), step.rest.split()[0])
        if image not in stages and not re.search(r":\d+\.\d+\.\d+-|@sha256:[0-9a-f]{64}$", image):
            yield f"{image} is not pinned"
        stages.add(step.stage)


def user_is_not_root(text: str) -> Iterator[str]:
    users = [step.rest for step in final(text) if step.word == "USER"]
    # A number: Kubernetes' runAsNonRoot cannot determine whether a user name is root's.
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield f"the image runs as {users[-1:] or 'root'}"


def no_unchecked_downloads(text: str) -> Iterator[str]:
    yield from (f"ADD {step.rest}" for step in steps(text) if step.word == "ADD")
    yield from (command for _, command in runs(text, "(curl|wget)") if "http" in command)


def no_secrets(text: str) -> Iterator[str]:
    for step in steps(text):
        if step.word in ("ARG", "ENV", "LABEL") and re.search(r"(?i)(key|secret|token|passw|credential)", step.rest):
            yield step.rest


def apt_cache_is_removed(text: str) -> Iterator[str]:
    for step, command in runs(text, "apt-get install"):
        if "--no-install-recommends" not in command or " -y " not in command:
            yield command
        if "apt-get update" not in step.rest or "rm -rf /var/lib/apt/lists/*" not in step.rest:
            yield f"package lists are left: {step.rest}"


def no_compiler_in_image(text: str) -> Iterator[str]:
    for step, command in runs(text, "apt-get install"):
        if step in final(text) and re.search(r"gcc|g\+\+|clang|build-essential|-dev\b|make|git", command):
            yield command


def pip_versions_are_pinned(text: str) -> Iterator[str]:
    for step, command in runs(text, r"pip (install|wheel)"):
        if "-c constraints.txt" not in command and "--no-deps" not in command:
            yield command
        if step in final(text) and not {"--no-cache-dir", "--no-index"} <= set(command.split()):
            yield command


def sources_exist(text: str) -> Iterator[str]:
    stages = {step.stage for step in steps(text)}
    for step in steps(text):
        yield from (f"no stage {name}" for name in re.findall(r"\bfrom=([\w-]+)", step.rest) if name not in stages)
        if step.word == "COPY" and "--from" not in step.rest:
            yield from (f"no {source}" for source in step.rest.split()[:-1] if not copied_files(source, IGNORE))


def has_health_check(text: str) -> Iterator[str]:
    checks = [step.rest for step in final(text) if step.word == "HEALTHCHECK"]
    if not checks or "CMD" not in checks[-1]:
        yield "no HEALTHCHECK"


def entry_point_exists(text: str) -> Iterator[str]:
    entry = [step.rest for step in final(text) if step.word == "ENTRYPOINT"]
    if len(entry) != 1 or not entry[0].startswith("["):
        yield f"{entry}: a shell would not forward signals to the command"
    elif json.loads(entry[0])[0] not in PROJECT["scripts"]:
        yield f"no such command: {entry[0]}"
    for name in re.findall(r"\bjobs/(\w+\.\w+)", text):
        if not (ROOT / "jobs" / name).is_file():
            yield f"no jobs/{name}"


def labels_match_pyproject(text: str) -> Iterator[str]:
    labels = " ".join(step.rest for step in final(text) if step.word == "LABEL")
    actual = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', labels))
    expected = {"title": PROJECT["name"], "description": PROJECT["description"], "version": "${VERSION}"}
    expected["licenses"] = PROJECT["license"]
    yield from (f"{name}: {actual.get(name)}" for name, value in expected.items() if actual.get(name) != value)
    if Step("runtime", 2, "ARG", f"VERSION={PROJECT['version']}") not in steps(text):
        yield "VERSION differs from pyproject.toml"


RULES: tuple[Callable[[str], Iterator[str]], ...] = (
    base_images_are_pinned,
    user_is_not_root,
    no_unchecked_downloads,
    no_secrets,
    apt_cache_is_removed,
    no_compiler_in_image,
    pip_versions_are_pinned,
    sources_exist,
    has_health_check,
    entry_point_exists,
    labels_match_pyproject,
)

BROKEN = (
    (base_images_are_pinned, "PYTHON_TAG=3.11.15-slim-trixie", "PYTHON_TAG=3.11-slim"),
    (base_images_are_pinned, "FROM wheels AS package", "FROM python:latest AS package"),
    (user_is_not_root, "USER 1000:1000", "USER ray"),
    (user_is_not_root, "USER 1000:1000", "USER 0"),
    (user_is_not_root, "USER 1000:1000\n", ""),
    (no_unchecked_downloads, "COPY jobs/ jobs/", "ADD https://example.org/jobs.tar.gz jobs/"),
    (no_unchecked_downloads, "&& useradd", "&& wget https://example.org/a.sh && useradd"),
    (no_secrets, "ARG VERSION=", "ARG AWS_SECRET_ACCESS_KEY=\nARG VERSION="),
    (no_secrets, "RAY_USAGE_STATS_ENABLED=0", "RAY_AUTH_TOKEN=0"),
    (apt_cache_is_removed, " --no-install-recommends", ""),
    (apt_cache_is_removed, "    && rm -rf /var/lib/apt/lists/* \\\n", ""),
    (apt_cache_is_removed, "apt-get update", "true"),
    (no_compiler_in_image, "recommends wget", "recommends wget build-essential"),
    (pip_versions_are_pinned, "-c constraints.txt setuptools", "setuptools"),
    (pip_versions_are_pinned, "--no-index --no-deps /dist", "--no-deps /dist"),
    (sources_exist, "COPY jobs/ jobs/", "COPY job/ jobs/"),
    (sources_exist, "COPY jobs/ jobs/", "COPY tests/ tests/"),
    (sources_exist, "from=package", "from=packages"),
    (has_health_check, "HEALTHCHECK", "#"),
    (entry_point_exists, 'ENTRYPOINT ["raylivecell"]', 'ENTRYPOINT ["ray-livecell"]'),
    (entry_point_exists, 'ENTRYPOINT ["raylivecell"]', "ENTRYPOINT raylivecell"),
    (entry_point_exists, 'CMD ["--help"]', 'CMD ["python", "jobs/training.py"]'),
    (labels_match_pyproject, "Apache-2.0", "MIT"),
    (labels_match_pyproject, "VERSION=0.1.0", "VERSION=0.0.9"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_dockerfile_passes(rule: Callable[[str], Iterator[str]]) -> None:
    assert list(rule(TEXT)) == []


@pytest.mark.parametrize(("rule", "old", "new"), BROKEN, ids=[f"{rule.__name__}-{new}" for rule, _, new in BROKEN])
def test_rule_rejects_broken_dockerfile(rule: Callable[[str], Iterator[str]], old: str, new: str) -> None:
    assert old in TEXT
    assert list(rule(TEXT.replace(old, new)))


def test_every_rule_has_a_broken_example() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


@pytest.mark.parametrize("name", [".git/config", ".env", "data/a.tif", "jobs/key.pem", "raylivecell/a/b.txt", "tests"])
def test_context_excludes(name: str) -> None:
    assert not in_context(name, IGNORE)


@pytest.mark.parametrize("name", ["raylivecell/recipe.py", "raylivecell/cli/main.py", "raylivecell/recipes/small.yaml"])
def test_context_includes(name: str) -> None:
    assert (ROOT / name).is_file()
    assert in_context(name, IGNORE)


def shell(command: str, *, bin: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `command` as RUN does, with the programs in `bin` first on PATH."""
    env = {"PATH": f"{bin}:/usr/local/bin:/usr/bin:/bin"} | env
    return subprocess.run(["sh", "-ec", command], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("accelerator", "code", "index"),
    [("cpu", 0, "--index-url https://download.pytorch.org/whl/cpu"), ("cuda", 0, ""), ("rocm", 2, None)],
)
def test_torch_is_installed_from_the_index_of_the_accelerator(
    accelerator: str, code: int, index: str | None, tmp_path: Path
) -> None:
    program(tmp_path / "pip", 'echo "$@"')
    (torch,) = (step for step, command in runs(TEXT, "pip wheel") if command.endswith(" torch"))
    done = shell(torch.rest, bin=tmp_path, cwd=tmp_path, ACCELERATOR=accelerator)
    assert done.returncode == code
    if index is None:
        assert "'rocm'" in done.stderr
        assert not done.stdout
    else:
        assert ("--index-url" in done.stdout) == bool(index)
        assert index in done.stdout


@pytest.mark.parametrize(
    ("has_ray", "answer", "healthy"),
    [(False, "exit 4", True), (True, "echo success", True), (True, "exit 4", False), (True, "echo failed", False)],
)
def test_health_check_queries_the_raylet_if_there_is_one(
    has_ray: bool, answer: str, healthy: bool, tmp_path: Path
) -> None:
    program(tmp_path / "wget", answer)
    (check,) = (step.rest.split("CMD", 1)[1] for step in final(TEXT) if step.word == "HEALTHCHECK")
    command = check.replace("-S /tmp/ray/session_latest/sockets/raylet", f"-e {tmp_path}/raylet")
    assert command != check
    if has_ray:
        (tmp_path / "raylet").touch()
    assert (shell(command, bin=tmp_path, cwd=tmp_path).returncode == 0) == healthy


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the COPY and pip RUN instructions of the stages `package` and `runtime` were executed.

    The dependencies are those of this environment; everything else is from the Dockerfile.
    """
    root = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
    site = next((root / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    program(root / "build" / "pip", f'exec "{sys.executable}" -m pip "$@"')
    program(root / "bin" / "pip", f'exec "{sys.executable}" -m pip --python "{root}/venv/bin/python" "$@"')
    folder = root
    for step in steps(TEXT):
        programs = root / ("build" if step.number < 2 else "bin")
        if step.word == "WORKDIR":
            folder = root / step.rest.lstrip("/")
            folder.mkdir(exist_ok=True)
        elif step.word == "COPY":
            for name in (name for source in step.rest.split()[:-1] for name in copied_files(source, IGNORE)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        elif step.word == "RUN" and "/dist" in step.rest:
            command = re.sub(r"--mount=\S+", "", step.rest).replace("/dist", f"{root}/dist")
            done = shell(command, bin=programs, cwd=folder, PIP_DISABLE_PIP_VERSION_CHECK="1")
            assert done.returncode == 0, done.stdout + done.stderr
    return root


def run_in_image(image: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `words` in the image's working directory, with its environment."""
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(step.rest for step in final(TEXT) if step.word == "ENV")))
    home = image / environment["HOME"].lstrip("/")
    home.mkdir(parents=True, exist_ok=True)
    (folder,) = (step.rest.lstrip("/") for step in final(TEXT) if step.word == "WORKDIR")
    environment |= {"HOME": str(home), "PATH": f"{image}/venv/bin:{os.defpath}", "NO_COLOR": "1"}
    return subprocess.run(
        [image / "venv" / "bin" / words[0], *words[1:]],
        cwd=image / folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_image_contains_the_complete_package(image: Path) -> None:
    (site,) = (image / "venv").glob("lib/python*/site-packages")

    def files(folder: Path) -> set[str]:
        paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(folder)) for path in paths}

    assert files(site / "raylivecell") == files(ROOT / "raylivecell")
    done = run_in_image(image, "python", "-c", "import raylivecell; print(raylivecell.__file__)")
    assert done.stdout.strip() == str(site / "raylivecell" / "__init__.py")


@pytest.mark.slow
def test_image_runs_the_command_line(image: Path) -> None:
    entry, default = (
        json.loads(step.rest) for word in ("ENTRYPOINT", "CMD") for step in final(TEXT) if step.word == word
    )
    assert run_in_image(image, *entry, "--version").stdout.strip() == PROJECT["version"]
    assert "`raylivecell COMMAND --help`" in run_in_image(image, *entry, *default).stdout


@pytest.mark.slow
def test_image_runs_the_jobs(image: Path) -> None:
    done = run_in_image(image, "python", "jobs/train.py", "--help")
    assert done.returncode == 0, done.stderr
    assert "raylivecell train" in done.stdout
    scripts = {path.name for path in (ROOT / "jobs").iterdir() if path.is_file()}
    assert {path.name for path in (image / "app" / "jobs").iterdir()} == scripts
