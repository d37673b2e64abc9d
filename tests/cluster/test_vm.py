"""cluster/vm: Ray, EC2 and this project accept the files for `ray up` and Slurm."""

import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from conftest import skip_or_fail
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from raylivecell.cli import main

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "vm"
LAUNCHER = Path(ray.autoscaler.__file__).parent
SCHEMA = json.loads((LAUNCHER / "ray-schema.json").read_text())
TEXTS = {name: (FOLDER / f"{name}.yaml").read_text() for name in ("aws-spot", "on-premises")}
COMMANDS = ("setup_commands", "head_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")

Config = dict[str, Any]


def provider_fields(provider: str) -> set[str]:
    """Fields of `provider:` that Ray's code for this provider reads; the schema allows any."""
    files = [*(LAUNCHER / "_private").glob("*.py"), *(LAUNCHER / "_private" / provider).rglob("*.py")]
    access = r"""(?:provider_config|\["provider"\])(?:\.get\(|\[)\s*"(\w+)\""""
    return {name for file in files for name in re.findall(access, file.read_text())}


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def start_commands(config: Config, node: str) -> list[str]:
    return [line for line in config[f"{node}_start_ray_commands"] if re.search(r"\bray start\b", line)]


def provider_fields_are_read(config: Config) -> Iterator[str]:
    fields_read = provider_fields(config["provider"]["type"])
    yield from (f"provider.{name} is not read by Ray" for name in config["provider"] if name not in fields_read)


def node_config_is_valid(config: Config) -> Iterator[str]:
    """Checked with botocore's model of RunInstances; the schema allows any node_config."""
    from botocore.session import Session
    from botocore.validate import ParamValidator

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, node in config.get("available_node_types", {}).items():
        errors = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node["node_config"]}, shape)
        if errors.has_errors():
            yield f"{name}: {errors.generate_report()}"


def no_work_on_head(config: Config) -> Iterator[str]:
    types = config.get("available_node_types", {})
    by_type = types and types[config["head_node_type"]]["resources"].get("CPU") == 0
    if not by_type and not any("--num-cpus=0" in line for line in start_commands(config, "head")):
        yield "the head has CPUs"


def only_training_is_on_spot_machines(config: Config) -> Iterator[str]:
    for name, node in config.get("available_node_types", {}).items():
        spot = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        if spot != (name == "training"):
            yield f"{name} on {'spot' if spot else 'on-demand'} machines"
        if name != config["head_node_type"] and node["labels"].get("pool") != name:
            yield f"{name}: its label is missing"


def token_is_required(config: Config) -> Iterator[str]:
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        yield "the token is not copied to the nodes"
    for node in ("head", "worker"):
        commands = start_commands(config, node)
        if len(commands) != 1 or not re.match(r"export [^;]*\bRAY_AUTH_MODE=token\b[^;]*;", commands[0]):
            yield f"{node}: Ray starts without token authentication"


def dashboard_is_local(config: Config) -> Iterator[str]:
    if not all("--dashboard-host=127.0.0.1" in line for line in start_commands(config, "head")):
        yield "the dashboard listens on other interfaces than 127.0.0.1"


def on_premises_uses_autoscaler_v1(config: Config) -> Iterator[str]:
    """Autoscaler v2 counts the head as a worker of a `local` provider: observed with Ray 2.60 on two hosts."""
    v1 = all("RAY_enable_autoscaler_v2=0" in line for line in start_commands(config, "head"))
    if config["provider"]["type"] == "local" and not v1:
        yield "autoscaler v2 starts one worker too few"


def ray_start_options_exist(config: Config) -> Iterator[str]:
    for line in start_commands(config, "head") + start_commands(config, "worker"):
        options = re.findall(r"(--[\w-]+)", line.split("ray start", 1)[1])
        yield from (f"ray start has no {option}" for option in options if option not in options_of(scripts.start))


def referenced_files_exist(config: Config) -> Iterator[str]:
    mounts = {remote.removeprefix("~/raylivecell/"): local for remote, local in config["file_mounts"].items()}
    for remote, local in mounts.items():
        if not local.startswith("~") and (remote != local or not (ROOT / local).exists()):
            yield f"{local} mounted at {remote}"
    for line in (line for field in COMMANDS for line in config.get(field, [])):
        for name in re.findall(r"~/raylivecell/([\w./-]+)", line):
            if not (ROOT / name).is_file() or not any(
                name == mount or name.startswith(f"{mount}/") for mount in mounts
            ):
                yield f"{name} is not on the nodes"
    # setup.sh installs the project from there, so all files that pyproject.toml refers to must be copied.
    required = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "raylivecell"}
    yield from (f"{name} is not copied" for name in required - set(mounts))


def no_secrets(config: Config) -> Iterator[str]:
    yield from re.findall(r"AKIA\w+|(?i:secret\w*|passw\w*|access_key\w*|RAY_AUTH_TOKEN)", json.dumps(config))


RULES: tuple[Callable[[Config], Iterator[str]], ...] = (
    provider_fields_are_read,
    node_config_is_valid,
    no_work_on_head,
    only_training_is_on_spot_machines,
    token_is_required,
    dashboard_is_local,
    on_premises_uses_autoscaler_v1,
    ray_start_options_exist,
    referenced_files_exist,
    no_secrets,
)

BROKEN = (
    (provider_fields_are_read, "aws-spot", "cache_stopped_nodes", "cache_stoped_nodes"),
    (provider_fields_are_read, "aws-spot", "availability_zone:", "availability_zones:"),
    (provider_fields_are_read, "on-premises", "worker_ips", "workers_ips"),
    (node_config_is_valid, "aws-spot", "MarketType: spot", "MarketTyp: spot"),
    (node_config_is_valid, "aws-spot", "VolumeSize: 80", "VolumeSize: 80 GB"),
    (no_work_on_head, "aws-spot", "resources: {CPU: 0}", "resources: {}"),
    (no_work_on_head, "on-premises", " --num-cpus=0", ""),
    (only_training_is_on_spot_machines, "aws-spot", "      InstanceMarketOptions: {MarketType: spot}\n", ""),
    (only_training_is_on_spot_machines, "aws-spot", "pool: data", "pools: data"),
    (token_is_required, "aws-spot", "  ~/.ray/auth_token: ~/.ray/auth_token\n", ""),
    (token_is_required, "on-premises", "export RAY_AUTH_MODE=token ", "export "),
    (dashboard_is_local, "aws-spot", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    (dashboard_is_local, "on-premises", " --dashboard-host=127.0.0.1", ""),
    (on_premises_uses_autoscaler_v1, "on-premises", "RAY_enable_autoscaler_v2=0 ", ""),
    (ray_start_options_exist, "on-premises", "--object-manager-port", "--object-manager-prt"),
    (referenced_files_exist, "aws-spot", "bash ~/raylivecell/cluster/vm/setup.sh", "bash ~/raylivecell/setup.sh"),
    (referenced_files_exist, "aws-spot", "  ~/raylivecell/LICENSE: LICENSE\n", ""),
    (referenced_files_exist, "on-premises", "raylivecell/raylivecell: raylivecell", "raylivecell/raylivecell: src"),
    (no_secrets, "aws-spot", "ssh_user: ubuntu", "ssh_user: AKIAIOSFODNN7EXAMPLE"),
)


@pytest.mark.parametrize("name", TEXTS)
def test_ray_accepts_config(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load(TEXTS[name])
    jsonschema.validate(config, SCHEMA)
    validate_config(prepare_config(config))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("aws-spot", "max_workers: 8", "max_worker: 8"),
        ("aws-spot", "max_workers: 8", "max_workers: 1"),
        ("aws-spot", "head_node_type: head", "head_node_type: heads"),
        ("on-premises", "setup_commands:\n  -", "setup_commands:"),
        ("on-premises", "ssh_private_key", "ssh_key"),
    ],
)
def test_ray_rejects_broken_config(name: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert old in TEXTS[name]
    with pytest.raises((ValueError, TypeError, jsonschema.ValidationError)):
        validate_config(prepare_config(yaml.safe_load(TEXTS[name].replace(old, new, 1))))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_config_passes(rule: Callable[[Config], Iterator[str]], name: str) -> None:
    assert list(rule(yaml.safe_load(TEXTS[name]))) == []


@pytest.mark.parametrize(
    ("rule", "name", "old", "new"), BROKEN, ids=[f"{rule.__name__}-{new}" for rule, _, _, new in BROKEN]
)
def test_rule_rejects_broken_config(rule: Callable[[Config], Iterator[str]], name: str, old: str, new: str) -> None:
    assert old in TEXTS[name]
    assert list(rule(yaml.safe_load(TEXTS[name].replace(old, new))))


def test_every_rule_has_a_broken_example() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES)


def test_python_of_the_machines_is_supported() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    from packaging.specifiers import SpecifierSet

    images = re.findall(r"ImageId: (\S+)", TEXTS["aws-spot"])
    assert len(images) == 2
    assert all("24.04" in image for image in images)
    supported = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert SpecifierSet(supported).contains("3.12")  # Ubuntu 24.04's


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_script(name: str, tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script of cluster/vm with its own HOME and the programs in tmp_path/bin first on PATH."""
    (tmp_path / "home").mkdir(exist_ok=True)
    env |= {"HOME": str(tmp_path / "home"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", FOLDER / name, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("name", [path.name for path in FOLDER.glob("*.sh")])
def test_scripts_pass_shellcheck(name: str) -> None:
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    if not shutil.which("shellcheck"):
        skip_or_fail("no shellcheck: install Debian's package of that name")
    done = subprocess.run(["shellcheck", FOLDER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("gpu", [True, False])
def test_setup_installs_cuda_only_with_a_gpu(gpu: bool, tmp_path: Path) -> None:
    program(tmp_path / "home" / "venv" / "bin" / "pip", f'pwd >> {tmp_path}/log; echo "$@" >> {tmp_path}/log')
    program(tmp_path / "bin" / "nvidia-smi", "exit 0" if gpu else "exit 9")
    program(tmp_path / "bin" / "sudo", f"echo apt >> {tmp_path}/log")
    done = run_script("setup.sh", tmp_path)
    assert done.returncode == 0, done.stderr
    log = [line for line in (tmp_path / "log").read_text().splitlines() if line != "apt"]
    assert log[::2] == [str(ROOT)] * 2
    assert ("--index-url https://download.pytorch.org/whl/cpu" in log[1]) == (not gpu)
    assert log[1].endswith("-c constraints.txt torch")
    assert log[3].endswith("-c constraints.txt .")
    for _ in range(2):  # `ray down` finds ray in .bashrc; a second run adds nothing
        assert run_script("setup.sh", tmp_path).returncode == 0
    profile = (tmp_path / "home" / ".bashrc").read_text()
    assert profile.splitlines() == ["export PATH=$HOME/venv/bin:$PATH RAY_AUTH_MODE=token"]


def slurm(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    program(tmp_path / "bin" / "srun", 'shift; printf "%s\\n" "$@"')
    program(tmp_path / "bin" / "hostname", "echo 10.0.0.7 172.17.0.1")
    env = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_ID": "1"}
    return run_script("slurm.sh", tmp_path, "--recipe", "paper", "--out", "a b", **env)


def test_slurm_commands_are_accepted_by_ray_and_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(tmp_path / "home" / ".ray" / "auth_token", "")
    done = slurm(tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    split = words.index("--")
    assert words[:6] == ["ray", "symmetric-run", "--address", "10.0.0.7:6379", "--min-nodes", "2"]
    assert {word.split("=")[0] for word in words[6:split]} <= options_of(scripts.start)
    script = words.index("python") + 1
    assert words[split + 1 : script] == ["env", "RAY_ADDRESS=10.0.0.7:6379", "python"]
    assert (ROOT / words[script]).is_file()
    assert words[script + 1 :] == ["--resume", "auto", "--recipe", "paper", "--out", "a b"]
    with pytest.raises(SystemExit):
        main.main([Path(words[script]).stem, "--help"])
    documented = capsys.readouterr().out
    assert all(word in documented for word in words[script:] if word.startswith("--"))


def test_slurm_without_a_token_names_the_command_for_one(tmp_path: Path) -> None:
    done = slurm(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "ray get-auth-token --generate" in done.stderr


@pytest.fixture
def spot_notice() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spot_notice", FOLDER / "spot_notice.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def metadata() -> Iterator[tuple[str, list[str | None]]]:
    """EC2's metadata service (version 2): its URL, and its responses in order; None is a 404."""
    answers: list[str | None] = []

    class Service(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            valid = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.reply("key" if valid else None)

        def do_GET(self) -> None:
            valid = self.path == "/latest/meta-data/spot/instance-action"
            self.reply(answers.pop(0) if valid and self.headers["X-aws-ec2-metadata-token"] == "key" else None)

        def reply(self, text: str | None) -> None:
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_spot_notice_drains_the_node_before_the_machine_stops(
    spot_notice: ModuleType, metadata: tuple[str, list[str | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = metadata
    end = datetime.now(timezone.utc) + timedelta(seconds=120)
    notice = json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})
    answers += [None, "no JSON", "{}", None, notice]
    sleeps: list[float] = []
    monkeypatch.setattr(spot_notice.time, "sleep", sleeps.append)
    program(tmp_path / "ray", f'printf "%s\\n" "$@" > {tmp_path}/words')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert spot_notice.main(url) == 0
    assert sleeps == [spot_notice.POLL_S] * 4
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:3] == ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    assert 60 < int(words[-1]) <= 110
    options = scripts.drain_node.make_context("drain-node", words[1:]).params
    assert options["deadline_remaining_seconds"] == int(words[-1])


def test_a_missing_metadata_service_is_not_a_notice(spot_notice: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    assert spot_notice.stop_time("http://127.0.0.1:9") is None


def test_commands_and_files_in_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = (FOLDER / "README.md").read_text()
    assert text.isascii()
    for name in re.findall(r"\b(?:cluster/vm|jobs)/[\w.-]+\w", text):
        assert (ROOT / name).is_file(), name
    commands = re.findall(r"\braylivecell ((?:check|submit) [^'`\n]*)", text.replace("\\\n", ""))
    lines = [shlex.split(line) for line in commands]
    assert {words[0] for words in lines} == {"submit", "check"}
    for words in lines:
        documented = ""
        for command in [words[0], *(word for word in words[1:] if word in main.COMMANDS)]:
            with pytest.raises(SystemExit):
                main.main([command, "--help"])
            documented += capsys.readouterr().out
        assert [word for word in words if word.startswith("--") and word not in documented] == []
    subcommands = re.findall(r"^(?:ray|ray exec \S+ 'ray) ([a-z-]+)", text, flags=re.M)
    assert {*subcommands} <= {*scripts.cli.commands}
