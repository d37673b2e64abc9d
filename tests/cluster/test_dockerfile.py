"""The Dockerfile: its rules, what its builder sees, and what its image runs as far as there is no engine here."""

import fnmatch
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
    """An instruction, in which stage it stands and that stage's number."""

    stage: str
    number: int
    word: str
    rest: str


def steps(text: str) -> list[Step]:
    """The instructions of a Dockerfile; those before the first FROM are in stage ''."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: list[Step] = []
    stage, number = "", -1
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        word, rest = line.split(None, 1)
        if word == "FROM":
            number += 1
            stage = rest.split(" AS ")[1] if " AS " in rest else str(number)
        found.append(Step(stage, number, word, rest.strip()))
    return found


def final(text: str) -> list[Step]:
    """The instructions of the stage that becomes the image."""
    found = steps(text)
    return [step for step in found if step.number == found[-1].number]


def runs(text: str, program: str) -> Iterator[tuple[Step, str]]:
    """Each call of `program` in a RUN, and that RUN."""
    for step in steps(text):
        if step.word == "RUN":
            for command in re.split(r"&&|\|\||;", step.rest):
                if re.search(rf"(^|\s){program}\s", command):
                    yield step, command.strip()


def admitted(path: str, ignore: str) -> bool:
    """Whether .dockerignore lets `path` travel to the builder: the last pattern that fits it or its folders decides."""
    verdict = True
    for pattern in (line for line in ignore.splitlines() if line and not line.startswith("#")):
        parts = pattern.removeprefix("!").split("/")
        head = path.split("/")[: len(parts)]
        if len(head) == len(parts) and all(map(fnmatch.fnmatchcase, head, parts)):
            verdict = pattern.startswith("!")
    return verdict


def sent(source: str, ignore: str) -> list[str]:
    """The files of this project that COPY `source` takes."""
    path = ROOT / source
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return [name for file in files if admitted(name := file.relative_to(ROOT).as_posix(), ignore)]


def base_images_are_pinned(text: str) -> Iterator[str]:
    stages: set[str] = set()
    defaults = dict(step.rest.split("=", 1) for step in steps(text) if step.word == "ARG" and not step.stage)
    for step in (step for step in steps(text) if step.word == "FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda name: defaults.get(name[1], ""), step.rest.split()[0])
        if image not in stages and not re.search(r":\d+\.\d+\.\d+-|@sha256:[0-9a-f]{64}$", image):
            yield f"{image} is another image tomorrow"
        stages.add(step.stage)


def nothing_runs_as_root(text: str) -> Iterator[str]:
    users = [step.rest for step in final(text) if step.word == "USER"]
    # By number: Kubernetes' runAsNonRoot cannot see whether a name is root's.
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield f"the image runs as {users[-1:] or 'root'}"


def nothing_is_fetched_unchecked(text: str) -> Iterator[str]:
    yield from (f"ADD {step.rest}" for step in steps(text) if step.word == "ADD")
    yield from (command for _, command in runs(text, "(curl|wget)") if "http" in command)


def no_secrets(text: str) -> Iterator[str]:
    for step in steps(text):
        if step.word in ("ARG", "ENV", "LABEL") and re.search(r"(?i)(key|secret|token|passw|credential)", step.rest):
            yield step.rest


def apt_leaves_nothing(text: str) -> Iterator[str]:
    for step, command in runs(text, "apt-get install"):
        if "--no-install-recommends" not in command or " -y " not in command:
            yield command
        if "apt-get update" not in step.rest or "rm -rf /var/lib/apt/lists/*" not in step.rest:
            yield f"package lists: {step.rest}"


def no_compiler_in_the_image(text: str) -> Iterator[str]:
    for step, command in runs(text, "apt-get install"):
        if step in final(text) and re.search(r"gcc|g\+\+|clang|build-essential|-dev\b|make|git", command):
            yield command


def pip_installs_what_is_pinned(text: str) -> Iterator[str]:
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
            yield from (f"no {source}" for source in step.rest.split()[:-1] if not sent(source, IGNORE))


def it_has_a_health_check(text: str) -> Iterator[str]:
    checks = [step.rest for step in final(text) if step.word == "HEALTHCHECK"]
    if not checks or "CMD" not in checks[-1]:
        yield "no HEALTHCHECK"


def what_it_starts_is_ours(text: str) -> Iterator[str]:
    entry = [step.rest for step in final(text) if step.word == "ENTRYPOINT"]
    if len(entry) != 1 or not entry[0].startswith("["):
        yield f"{entry}: a shell in between would keep signals from the command"
    elif json.loads(entry[0])[0] not in PROJECT["scripts"]:
        yield f"no such command: {entry[0]}"
    for name in re.findall(r"\bjobs/(\w+\.\w+)", text):
        if not (ROOT / "jobs" / name).is_file():
            yield f"no jobs/{name}"


def it_says_what_it_is(text: str) -> Iterator[str]:
    labels = " ".join(step.rest for step in final(text) if step.word == "LABEL")
    named = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', labels))
    wanted = {"title": PROJECT["name"], "description": PROJECT["description"], "version": "${VERSION}"}
    wanted["licenses"] = PROJECT["license"]
    yield from (f"{name}: {named.get(name)}" for name, value in wanted.items() if named.get(name) != value)
    if Step("runtime", 2, "ARG", f"VERSION={PROJECT['version']}") not in steps(text):
        yield "VERSION is not pyproject.toml's"


RULES: tuple[Callable[[str], Iterator[str]], ...] = (
    base_images_are_pinned,
    nothing_runs_as_root,
    nothing_is_fetched_unchecked,
    no_secrets,
    apt_leaves_nothing,
    no_compiler_in_the_image,
    pip_installs_what_is_pinned,
    sources_exist,
    it_has_a_health_check,
    what_it_starts_is_ours,
    it_says_what_it_is,
)

BROKEN = (
    (base_images_are_pinned, "PYTHON_TAG=3.11.15-slim-trixie", "PYTHON_TAG=3.11-slim"),
    (base_images_are_pinned, "FROM wheels AS package", "FROM python:latest AS package"),
    (nothing_runs_as_root, "USER 1000:1000", "USER ray"),
    (nothing_runs_as_root, "USER 1000:1000", "USER 0"),
    (nothing_runs_as_root, "USER 1000:1000\n", ""),
    (nothing_is_fetched_unchecked, "COPY jobs/ jobs/", "ADD https://example.org/jobs.tar.gz jobs/"),
    (nothing_is_fetched_unchecked, "&& useradd", "&& wget https://example.org/a.sh && useradd"),
    (no_secrets, "ARG VERSION=", "ARG AWS_SECRET_ACCESS_KEY=\nARG VERSION="),
    (no_secrets, "RAY_USAGE_STATS_ENABLED=0", "RAY_AUTH_TOKEN=0"),
    (apt_leaves_nothing, " --no-install-recommends", ""),
    (apt_leaves_nothing, "    && rm -rf /var/lib/apt/lists/* \\\n", ""),
    (apt_leaves_nothing, "apt-get update", "true"),
    (no_compiler_in_the_image, "recommends wget", "recommends wget build-essential"),
    (pip_installs_what_is_pinned, "-c constraints.txt setuptools", "setuptools"),
    (pip_installs_what_is_pinned, "--no-index --no-deps /dist", "--no-deps /dist"),
    (sources_exist, "COPY jobs/ jobs/", "COPY job/ jobs/"),
    (sources_exist, "COPY jobs/ jobs/", "COPY tests/ tests/"),
    (sources_exist, "from=package", "from=packages"),
    (it_has_a_health_check, "HEALTHCHECK", "#"),
    (what_it_starts_is_ours, 'ENTRYPOINT ["raylivecell"]', 'ENTRYPOINT ["ray-livecell"]'),
    (what_it_starts_is_ours, 'ENTRYPOINT ["raylivecell"]', "ENTRYPOINT raylivecell"),
    (what_it_starts_is_ours, 'CMD ["--help"]', 'CMD ["python", "jobs/training.py"]'),
    (it_says_what_it_is, "Apache-2.0", "MIT"),
    (it_says_what_it_is, "VERSION=0.1.0", "VERSION=0.0.9"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_dockerfile_keeps_the_rule(rule: Callable[[str], Iterator[str]]) -> None:
    assert list(rule(TEXT)) == []


@pytest.mark.parametrize(("rule", "old", "new"), BROKEN, ids=[f"{rule.__name__}-{new}" for rule, _, new in BROKEN])
def test_the_rule_rejects_what_is_broken(rule: Callable[[str], Iterator[str]], old: str, new: str) -> None:
    assert old in TEXT
    assert list(rule(TEXT.replace(old, new)))


def test_every_rule_is_shown_to_reject() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


@pytest.mark.parametrize("name", [".git/config", ".env", "data/a.tif", "jobs/key.pem", "raylivecell/a/b.txt", "tests"])
def test_the_builder_sees_nothing_else(name: str) -> None:
    assert not admitted(name, IGNORE)


def shell(command: str, *, bin: Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `command` as a RUN would, with the programs in `bin` first."""
    env = {"PATH": f"{bin}:/usr/local/bin:/usr/bin:/bin"} | env
    return subprocess.run(["sh", "-ec", command], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("accelerator", "code", "asked"),
    [("cpu", 0, "--index-url https://download.pytorch.org/whl/cpu"), ("cuda", 0, ""), ("rocm", 2, None)],
)
def test_torch_comes_from_the_index_of_the_accelerator(
    accelerator: str, code: int, asked: str | None, tmp_path: Path
) -> None:
    program(tmp_path / "pip", 'echo "$@"')
    (torch,) = (step for step, command in runs(TEXT, "pip wheel") if command.endswith(" torch"))
    done = shell(torch.rest, bin=tmp_path, cwd=tmp_path, ACCELERATOR=accelerator)
    assert done.returncode == code
    if asked is None:
        assert "'rocm'" in done.stderr
        assert not done.stdout
    else:
        assert ("--index-url" in done.stdout) == bool(asked)
        assert asked in done.stdout


@pytest.mark.parametrize(
    ("has_ray", "answer", "healthy"),
    [(False, "exit 4", True), (True, "echo success", True), (True, "exit 4", False), (True, "echo failed", False)],
)
def test_the_health_check_asks_the_raylet_where_there_is_one(
    has_ray: bool, answer: str, healthy: bool, tmp_path: Path
) -> None:
    program(tmp_path / "wget", answer)
    (check,) = (step.rest.split("CMD", 1)[1] for step in final(TEXT) if step.word == "HEALTHCHECK")
    asked = check.replace("-S /tmp/ray/session_latest/sockets/raylet", f"-e {tmp_path}/raylet")
    assert asked != check
    if has_ray:
        (tmp_path / "raylet").touch()
    assert (shell(asked, bin=tmp_path, cwd=tmp_path).returncode == 0) == healthy


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which the stages `package` and `runtime` were played: their COPYs and their RUNs of pip.

    The dependencies are this environment's; everything else is what the Dockerfile brings.
    """
    root = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True)
    site = next((root / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    program(root / "build" / "pip", f'exec "{sys.executable}" -m pip "$@"')
    program(root / "bin" / "pip", f'exec "{sys.executable}" -m pip --python "{root}/venv/bin/python" "$@"')
    folder = root
    for step in steps(TEXT):
        here = root / ("build" if step.number < 2 else "bin")
        if step.word == "WORKDIR":
            folder = root / step.rest.lstrip("/")
            folder.mkdir(exist_ok=True)
        elif step.word == "COPY":
            for name in (name for source in step.rest.split()[:-1] for name in sent(source, IGNORE)):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        elif step.word == "RUN" and "/dist" in step.rest:
            command = re.sub(r"--mount=\S+", "", step.rest).replace("/dist", f"{root}/dist")
            done = shell(command, bin=here, cwd=folder, PIP_DISABLE_PIP_VERSION_CHECK="1")
            assert done.returncode == 0, done.stdout + done.stderr
    return root


def started(image: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What the image says when `words` are run in its working directory, with its environment."""
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
def test_the_package_in_the_image_is_whole(image: Path) -> None:
    (site,) = (image / "venv").glob("lib/python*/site-packages")

    def files(folder: Path) -> set[str]:
        found = (path for suffix in ("*.py", "*.yaml", "*.j2") for path in folder.rglob(suffix))
        return {str(path.relative_to(folder)) for path in found}

    assert files(site / "raylivecell") == files(ROOT / "raylivecell")
    told = started(image, "python", "-c", "import raylivecell; print(raylivecell.__file__)")
    assert told.stdout.strip() == str(site / "raylivecell" / "__init__.py")


@pytest.mark.slow
def test_the_image_runs_the_command_line(image: Path) -> None:
    entry, default = (
        json.loads(step.rest) for word in ("ENTRYPOINT", "CMD") for step in final(TEXT) if step.word == word
    )
    assert started(image, *entry, "--version").stdout.strip() == PROJECT["version"]
    assert "`raylivecell COMMAND --help`" in started(image, *entry, *default).stdout


@pytest.mark.slow
def test_the_image_runs_the_jobs(image: Path) -> None:
    told = started(image, "python", "jobs/train.py", "--help")
    assert told.returncode == 0, told.stderr
    assert "raylivecell train" in told.stdout
    ours = {path.name for path in (ROOT / "jobs").iterdir() if path.is_file()}
    assert {path.name for path in (image / "app" / "jobs").iterdir()} == ours
