"""Checks a cluster file before it costs money: Ray's own schema and loader, and what they miss.

`problems` gives lines, each with the place and what to change there. It launches nothing and asks
no cloud.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import logging
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from downpour.cluster.config.placement import LABEL
from downpour.cluster.deploy.pins import LOCK, ROLES, image_problem, pinned, requirements
from downpour.cluster.errors import UserError, one_line

TOKEN = "~/.ray/auth_token"
CLOUD_CLIENTS = {"aws": "boto3", "gcp": "google-api-python-client"}
_START = re.compile(r"\bray start\b(.*)", re.DOTALL)

Document = Mapping[str, Any]


def load(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a YAML file.

    Raises:
        UserError: the file cannot be read, or holds no cluster.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UserError(f"{path} does not hold a cluster: give a file for `ray up`, or KubeRay's")
    return documents


def problems(path: Path) -> list[str]:
    """Return what is wrong with a cluster file, a line each; none if nothing is.

    Raises:
        UserError: the file cannot be read, or holds no cluster.
    """
    documents = load(path)
    kinds = [document.get("kind") for document in documents]
    if any(kinds):
        from downpour.cluster.deploy.kuberay import kuberay_problems

        return kuberay_problems(documents)
    if len(documents) > 1:
        return [f"{len(documents)} documents in one file: `ray up` reads files with one"]
    (config,) = documents
    found = list(_schema_problems(config))
    if found:
        return found  # the other checks would fail on the same places
    return [
        *_token_problems(config),
        *_mount_problems(config),
        *_version_problems(config),
        *_start_problems(config),
        *_label_problems(config),
        *_provider_problems(config),
    ]


def _schema_problems(config: dict[str, Any]) -> Iterator[str]:
    """Yield what Ray's schema and loader say."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    told = io.StringIO()
    log = logging.getLogger("ray.autoscaler")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            prepared = prepare_config(copy.deepcopy(config))
            for node_type in prepared.get("available_node_types", {}).values():
                node_type.setdefault("resources", {})  # a provider fills these in later
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        place = ".".join(map(str, error.absolute_path)) or "the file"
        yield f"{place}: {error.message}"
    except SystemExit:
        lines = [line.strip() for line in told.getvalue().splitlines() if line.strip()]
        yield f"Ray refuses it: {' '.join(lines) or 'no reason given'}"
    except Exception as error:  # Ray's loader raises errors of all kinds
        yield f"Ray cannot read it: {type(error).__name__}: {one_line(error)}"
    finally:
        log.setLevel(level)


def _token_problems(config: Document) -> Iterator[str]:
    mounts = config.get("file_mounts") or {}
    if TOKEN not in mounts:
        yield (
            f"file_mounts: the token is not there, so nobody has to show one; add "
            f'"{TOKEN}": "{TOKEN}" (`ray get-auth-token --generate` makes it)'
        )
    for name, command in starts(config):
        if "RAY_AUTH_MODE=token" not in command:
            yield f"{name}: `ray start` without RAY_AUTH_MODE=token lets anybody in; export it"


def _mount_problems(config: Document) -> Iterator[str]:
    for target, source in (config.get("file_mounts") or {}).items():
        if Path(source).expanduser().exists():
            continue
        hint = (
            "run `ray get-auth-token --generate`"
            if source == TOKEN
            else "paths are seen from the folder in which `ray up` runs"
        )
        yield f"file_mounts: {source} (for {target}) does not exist here; {hint}"


def _version_problems(config: Document) -> Iterator[str]:
    pins = dict(pinned())
    own = importlib.metadata.version("ray")
    if pins.get("ray") != own:
        yield (
            f"ray {own} is installed here, and {LOCK} pins {pins.get('ray')}; install the pinned "
            f"one: pip install -r {LOCK}"
        )
    commands = [line for key in _SETUP for line in config.get(key) or ()]
    if not any(f"-r ~/downpour/{LOCK}" in line or f"-r {LOCK}" in line for line in commands):
        yield f"setup_commands: the pinned dependencies are not installed; pip install -r {LOCK}"
    for line in commands:
        for package, version in requirements(line):
            if package in pins and pins[package] != version:
                yield f"setup commands install {package} {version}, and the pin is {pins[package]}"
    image = (config.get("docker") or {}).get("image") or ""
    if image and (wrong := image_problem(image)):
        yield f"docker.image: {wrong}"


_SETUP = ("setup_commands", "head_setup_commands", "worker_setup_commands")


def starts(config: Document) -> Iterator[tuple[str, str]]:
    """Yield the commands that start Ray, each with the name of its list."""
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for command in config.get(key) or ():
            if _START.search(command):
                yield key, command


def flags(command: str) -> dict[str, str]:
    """Return the options of `ray start` in a command, by name."""
    found = _START.search(command)
    words = shlex.split(found[1]) if found else []
    pairs = (word.removeprefix("--").partition("=") for word in words if word.startswith("--"))
    return {name: value for name, _, value in pairs}


def _start_problems(config: Document) -> Iterator[str]:
    found = dict(starts(config))
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        if key not in found:
            yield f"{key}: no `ray start`, and Ray's own has no token; see ray_cluster.yaml"
    head = flags(found.get("head_start_ray_commands", ""))
    host = head.get("dashboard-host", "127.0.0.1")
    if host not in ("127.0.0.1", "localhost", "::1"):
        yield (
            f"head_start_ray_commands: --dashboard-host={host} opens the job API to the network; "
            "leave it at 127.0.0.1 and use `ray dashboard`"
        )
    if found and "head_start_ray_commands" in found and "autoscaling-config" not in head:
        yield (
            "head_start_ray_commands: without --autoscaling-config=~/ray_bootstrap_config.yaml "
            "no other node is started"
        )


def _label_problems(config: Document) -> Iterator[str]:
    types: Mapping[str, Any] = config.get("available_node_types") or {}
    if config["provider"]["type"] == "local":
        text = " ".join(command for _, command in starts(config))
        if f"{LABEL}=" not in text:
            yield f"worker_start_ray_commands: no --labels={LABEL}=..., so all is placed anywhere"
        return
    labelled: dict[str, int] = {}
    for name, node_type in types.items():
        role = (node_type.get("labels") or {}).get(LABEL)
        if role is None:
            if name != config.get("head_node_type"):
                yield (
                    f"available_node_types.{name}: no label {LABEL}, so nothing is placed there; "
                    f"give it one of {', '.join(ROLES)}"
                )
        else:
            most = node_type.get("max_workers", config.get("max_workers", 0))
            labelled[role] = labelled.get(role, 0) + most
    for role in ROLES:
        if not labelled.get(role):
            yield (
                f"available_node_types: no type with the label {LABEL}={role} may have a worker; "
                "label one, or raise its max_workers"
            )


def _provider_problems(config: Document) -> Iterator[str]:
    provider = config["provider"]
    kind = provider["type"]
    if kind in CLOUD_CLIENTS:
        package = CLOUD_CLIENTS[kind]
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield f"provider.type {kind} needs {package} here: pip install {package}"
        commands = config.get("head_setup_commands") or ()
        if not any(package in line for line in commands):
            yield f"head_setup_commands: the head needs {package}, too, to start other nodes"
    if kind == "gcp" and provider.get("project_id") in (None, "", "your-project"):
        yield "provider.project_id: put your project's id here"
    if kind == "local":
        yield from _local_problems(config, provider)


def _local_problems(config: Document, provider: Document) -> Iterator[str]:
    found = dict(starts(config))
    head = found.get("head_start_ray_commands", "")
    stated = flags(head).get("node-ip-address")
    if stated != provider.get("head_ip"):
        yield (
            f"head_start_ray_commands: --node-ip-address is {stated}, and provider.head_ip "
            f"{provider.get('head_ip')}; both have to be the head's address"
        )
    if "RAY_enable_autoscaler_v2=0" not in head:
        yield (
            "head_start_ray_commands: with this provider Ray 2.60's newer autoscaler ends the "
            "head; export RAY_enable_autoscaler_v2=0"
        )
    if "node-ip-address" not in flags(found.get("worker_start_ray_commands", "")):
        yield "worker_start_ray_commands: no --node-ip-address; Ray has to know them by worker_ips"
    addresses: Sequence[Any] = [provider.get("head_ip"), *(provider.get("worker_ips") or ())]
    for address in addresses:
        if not re.fullmatch(r"\d+(\.\d+){3}|[0-9a-fA-F:]+", str(address)):
            yield f"provider: {address} is not an address; Ray compares addresses, so give those"
    text = found.get("worker_start_ray_commands", "")
    for named in re.findall(r"(\d+(?:\.\d+){3})\) role=", text):
        if named not in addresses:
            yield f"worker_start_ray_commands: {named} has a role, but is none of worker_ips"
