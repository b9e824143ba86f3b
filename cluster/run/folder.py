"""A run is a folder: configuration, checkpoints, metrics, status, result, plots.

runs/<name>/
  config.json        the configuration, with every value
  code.json          network and loss, if no other process can import them (`sealed`)
  initial.safetensors  the weights that the run began with, if they were handed over
  resolved.json      what the machines made of it: the numbers of partitions, processes, threads
  status.json        where the run stands; replaced about once a second
  metrics.jsonl      a line a second, and a line for each evaluation
  control.json       what `downpour scale` asks for, while the run trains
  members.json       names of the processes that a driver can take over, see `--hot-standby`
  events.jsonl       a line for each loss and what was done about it, and for other news
  checkpoints/       what `downpour resume` goes on from
  record/            every push, in its order, if that is recorded
  best.safetensors   the weights that scored highest, with their BN statistics
  model.safetensors  the last weights, once the run is finished
  answers.json       which classes the last weights take for which, and their worst mistakes
  result.json        what came out
  plots/             pictures of all that
  report.html        a page with all of it, which needs no other file
  tensorboard/       the curves as TensorBoard events
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from downpour.cluster.config.plain import from_plain, to_plain, upgraded
from downpour.cluster.config.run import RunConfig
from downpour.cluster.config.secrets import check_no_secrets, texts_of
from downpour.cluster.errors import UserError
from downpour.cluster.run import liveness, sealed
from downpour.cluster.run.whereabouts import found_again
from downpour.paramserver import durable
from downpour.shuffler.dataset.bundled import at_hand

CONFIG, RESOLVED = "config.json", "resolved.json"
DATA, STATUS = "data.json", "status.json"
METRICS, EVENTS, RESULT = "metrics.jsonl", "events.jsonl", "result.json"
MEMBERS = "members.json"
CONTROL, RECORD, ABOUT_RECORD = "control.json", "record", "about.json"
BEGAN_IN = "folder"
"""In `data.json`: the folder that the run began in, which relative paths are meant from."""
MAX_REPLICAS = 10_000
STOP = ".stop"
"""There while somebody has asked the run to stop."""
BEST, MODEL, CHECKPOINTS = "best.safetensors", "model.safetensors", "checkpoints"
INITIAL = "initial.safetensors"
ANSWERS = "answers.json"
LOOK_BACK_BYTES = 4096
"""Read at a time while the last line of a file is looked for."""


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        """A folder that holds a run already; see `create` and `open`."""
        self.path = path.absolute()
        self._lock: int | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """Make the folder of a new run.

        Raises:
            UserError: the folder holds a run or something else, or cannot be written, or there are
                credentials in the configuration.
        """
        check_no_secrets(texts_of(to_plain(config)))
        if (path / CONFIG).exists():
            held = cls.open(path).config().recipe
            other = "" if held == config.recipe else f", not of {config.recipe}"
            raise UserError(
                f"{path} already holds a run of recipe {held}{other}: go on with "
                f"`downpour resume {path}`, or give another --name"
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not a run folder: give another --name")
        try:
            durable.make_folder(path.absolute())
            folder = cls(path)
            if config.model.carried:
                sealed.write(path, config.model.carried)
            folder.write_json(CONFIG, to_plain(config))
        except UserError:
            with contextlib.suppress(OSError):
                path.rmdir()
            raise
        except OSError as error:
            raise UserError(
                f"the run folder {path} cannot be written: {error.strerror or error}; give "
                "another place with --runs"
            ) from None
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that exists.

        Raises:
            UserError: it is no run's folder.
        """
        if not (path / CONFIG).is_file():
            raise UserError(
                f"{path} is not a run folder: it has no {CONFIG}; `downpour status` lists runs"
            )
        return cls(path)

    def discard_if_unused(self) -> None:
        """Remove the folder if nothing was trained, so that a mistake leaves nothing behind.

        A start that fails late has begun files of figures and a folder of checkpoints by then.
        """
        if not self.has_trained():
            shutil.rmtree(self.path)

    def has_trained(self) -> bool:
        """Whether an update has been told of, or a checkpoint or a result written."""
        if any((self.path / name).exists() for name in (RESULT, MODEL, BEST)):
            return True
        checkpoints = self.path / CHECKPOINTS
        if checkpoints.is_dir() and any(checkpoints.iterdir()):
            return True
        return any(line.get("updates") for line in self.read_lines(METRICS))

    def read_lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Read a file of JSON lines, less what is not whole; nothing if it is missing."""
        try:
            lines = (self.path / name).read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:  # the last line, while it is written
                continue
            if isinstance(found, dict):
                yield found

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def initial(self) -> Path | None:
        """The file with the weights that the run began with; None if the network made them."""
        path = self.path / INITIAL
        return path if path.exists() else None

    @property
    def checkpoints_uri(self) -> str:
        """The folder of the checkpoints."""
        elsewhere = self.config().policy.checkpoints
        if elsewhere is None:
            return (self.path / CHECKPOINTS).as_uri()
        if "://" not in elsewhere:
            elsewhere = Path(elsewhere).absolute().as_uri()
        return f"{elsewhere.rstrip('/')}/{self.name}"

    def config(self) -> RunConfig:
        """The configuration that the run began with, its paths as they are from here.

        Bundled data is this installation's.
        """
        config = from_plain(RunConfig, upgraded(self.read_json(CONFIG)))
        data = dataclasses.replace(config.data, data=self._found(at_hand(config.data.data)))
        policy = config.policy
        if policy.checkpoints is not None:
            policy = dataclasses.replace(policy, checkpoints=self._found(policy.checkpoints))
        model = dataclasses.replace(config.model, carried=sealed.read(self.path))
        return dataclasses.replace(config, data=data, policy=policy, model=model)

    def _found(self, path: str) -> str:
        noted = self.read_json(DATA) if (self.path / DATA).exists() else {}
        return found_again(path, self.path, noted.get(BEGAN_IN))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run, so that no other process trains it, and show that it is held.

        Raises:
            UserError: another process holds it, or the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(liveness.held(self.path))
            except liveness.Held:
                raise UserError(
                    f"{self.path} is being trained by another process: `downpour status "
                    f"{self.path}` shows it"
                ) from None
            except OSError as error:
                raise UserError(
                    f"the run folder {self.path} cannot be written: {error.strerror}"
                ) from None
            yield

    def held(self) -> bool:
        """Whether some process is seen to train the run now; see `pulse` for network disks."""
        return bool(liveness.is_locked(self.path))

    def pulse(self, clock: Callable[[], float] = time.monotonic) -> liveness.Pulse:
        """Begin to look whether something trains the run."""
        return liveness.Pulse(self.path, (STATUS, METRICS), clock)

    def ask_for_replicas(self, replicas: int) -> None:
        """Ask the process that trains the run for another number of replicas.

        The file is readable and writable by this user alone.
        """
        partial = self.path / f".{CONTROL}.partial"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w") as file:
            os.fchmod(fd, 0o600)
            json.dump({"replicas": replicas}, file)
        os.replace(partial, self.path / CONTROL)

    def replicas_asked_for(self) -> int | None:
        """Take what `ask_for_replicas` left; None if there is nothing.

        A file that somebody else can have written does not count.
        """
        try:
            fd = os.open(self.path / CONTROL, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        with os.fdopen(fd) as file:
            about = os.fstat(fd)
            with contextlib.suppress(OSError):
                os.unlink(self.path / CONTROL)
            if about.st_uid != os.geteuid() or about.st_mode & 0o077:
                return None
            try:
                replicas = json.load(file)["replicas"]
            except (ValueError, LookupError, TypeError, OSError):
                return None
        return replicas if type(replicas) is int and 1 <= replicas <= MAX_REPLICAS else None

    def request_stop(self) -> None:
        """Ask the process that trains the run to write a checkpoint and end.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            (self.path / STOP).touch()
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written: {error.strerror}"
            ) from None

    def stop_requested(self) -> bool:
        """Whether somebody has asked for an end."""
        return (self.path / STOP).exists()

    def clear_stop(self) -> None:
        """Forget that somebody has asked for an end."""
        (self.path / STOP).unlink(missing_ok=True)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file whole or not at all, so that it outlives a power failure.

        Raises:
            OSError: it cannot be written.
        """
        with durable.replacing(self.path / name, self._partial(name)) as partial:
            Path(partial).write_text(json.dumps(value, indent=2) + "\n")

    def write_status(self, value: Mapping[str, Any]) -> None:
        """Say where the run stands, for whoever looks now.

        It is said again within a second, so nobody waits for the disk.
        """
        partial = self._partial(STATUS)
        Path(partial).write_text(json.dumps(value, indent=2) + "\n")
        os.replace(partial, self.path / STATUS)

    def status(self) -> dict[str, Any]:
        """Where the run stands; empty if that is not known, after a power failure for example."""
        try:
            return self.read_json(STATUS)
        except UserError:
            return {}

    def _partial(self, name: str) -> str:
        return str(self.path / f".{name}.partial")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path / name
        try:
            value = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise UserError(f"{path} does not hold a JSON object")
        return value

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Add a line to the metrics."""
        self._append(METRICS, values)

    def append_event(self, text: str) -> None:
        """Add a line to the events."""
        self._append(EVENTS, {"event": text})

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        """Add a line to a file of JSON lines, whole or not at all.

        What a process that was killed, or a full disk, has left of a last line is cut off.
        """
        line = (json.dumps({"time": round(time.time(), 3), **values}) + "\n").encode()
        path = self.path / name
        durable.append(path, line, end=_end_of_lines(path))


def _end_of_lines(path: Path) -> int:
    """Return where the last whole line of a file ends; 0 if there is none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - LOOK_BACK_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
    return 0
