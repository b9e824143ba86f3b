"""A Ray Serve deployment that answers images with class probabilities, over HTTP.

    POST /predict     an image file as the body; JSON with the most probable classes
    GET  /stats       how many images in how many batches so far

Requests that arrive together go through the network together. Callers have to show a key (`key`),
whatever the address. The default address is loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downpour.cluster.errors import UserError
from downpour.cluster.serving import key

MAX_BODY_BYTES = 32 << 20
READY_DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a run is served."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    crops: int = 1
    """Crops of each image: 1, 10 or 144."""
    top: int = 5
    """Classes in an answer."""
    max_batch: int = 32
    """Most images that go through the network together."""
    batch_wait_s: float = 0.01
    """Longest that a request waits for others to join its batch."""
    copies: int = 1
    """Processes that answer."""
    key_file: str | None = None
    """File with the key that callers show, readable by its owner alone; default: a new key."""

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            raise ValueError(f"host is {self.host!r}: give an IP address of the machine") from None
        if not 1 <= self.port < 65536:
            raise ValueError(f"port is {self.port}: give 1 to 65535")
        if self.crops not in (1, 10, 144):
            raise ValueError(f"crops is {self.crops}: give 1, 10 or 144")
        for name in ("top", "max_batch", "copies"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"{name.replace('_', ' ')} is {value}: give at least 1")
        if not 0 <= self.batch_wait_s <= 10:
            raise ValueError(f"batch wait is {self.batch_wait_s}: give 0 to 10 seconds")

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


class Refused(Exception):
    """A request that is answered with a status of 4xx and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Classifier:
    """Answers requests. Plain Python; `application` makes a Serve deployment of it."""

    def __init__(
        self,
        runs: Sequence[str],
        *,
        best: bool,
        weights: str | None,
        config: ServeConfig,
        digest: str,
    ) -> None:
        """Load the runs' weights. `digest` is of the header that callers have to show."""
        import torch

        from downpour.cluster.serving import inference
        from downpour.workers.evaluation.predictor import Predictor

        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        loaded = [inference.load(Path(run), best=best, weights=weights) for run in runs]
        self._predictor = Predictor([run.network for run in loaded], crops=config.crops)
        self._channels = loaded[0].network.spec.image.channels
        self._names = loaded[0].class_names
        self._config = config
        self._digest = digest
        self._requests = self._batches = self._largest = 0

    async def answer(self, request: Any, predict_batch: Any) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON for a request; `predict_batch` gets checked images."""
        try:
            self._admit(request.headers.get("authorization", ""))
            path, method = request.url.path, request.method
            if (method, path) == ("GET", "/stats"):
                return 200, self.stats()
            if path != "/predict":
                raise Refused(404, f"there is nothing at {path}: POST an image to /predict")
            if method != "POST":
                raise Refused(405, f"{method} is not for /predict: POST an image file to it")
            data = await self._body(request)
            await asyncio.to_thread(self.check_image, data)
            return 200, {"predictions": await predict_batch(data)}
        except Refused as error:
            return error.status, {"error": str(error)}

    def _admit(self, header: str) -> None:
        # Serve's proxy has checked the key already, unless it ran before this deployment.
        if not key.admits(self._digest, header):
            raise Refused(401, key.REFUSED)

    async def _body(self, request: Any) -> bytes:
        data = bytearray()
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise Refused(413, f"the image has more than {MAX_BODY_BYTES:,} bytes")
        if not data:
            raise Refused(400, "the body is empty: send an image file")
        return bytes(data)

    def check_image(self, data: bytes) -> None:
        """Check that `data` is an image that can be decoded.

        Raises:
            Refused: it is not, or it has too many pixels.
        """
        from downpour.shuffler.errors import DecodeError, ImageTooLarge
        from downpour.shuffler.images.decode import decode_image

        try:
            decode_image(data, self._channels)
        except ImageTooLarge as error:
            raise Refused(413, f"the image is too large: {error}") from error
        except DecodeError as error:
            raise Refused(400, f"the image cannot be decoded: {error}") from error

    def predict(self, images: Sequence[bytes]) -> list[list[dict[str, Any]]]:
        """Return the most probable classes of each image."""
        from downpour.cluster.serving.prediction import predict

        self._requests += len(images)
        self._batches += 1
        self._largest = max(self._largest, len(images))
        names = [str(i) for i in range(len(images))]
        found = predict(self._predictor, self._names, images, names, top=self._config.top)
        return [one.classes for one in found]

    def stats(self) -> dict[str, int]:
        """Return the images and batches so far, and the largest batch."""
        return {
            "requests": self._requests,
            "batches": self._batches,
            "largest_batch": self._largest,
        }


def application(
    runs: Sequence[Path],
    *,
    best: bool,
    weights: str | None,
    config: ServeConfig,
    digest: str,
) -> Any:
    """Return the Serve application that answers with the networks of `runs`, as an ensemble."""
    from ray import serve

    @serve.deployment(
        name="classifier",
        num_replicas=config.copies,
        max_ongoing_requests=4 * config.max_batch,
        ray_actor_options={"num_cpus": 1},
    )
    class Deployment:
        def __init__(self) -> None:
            _keep_to_loopback()
            folders = [str(run.absolute()) for run in runs]
            self._classifier = Classifier(
                folders, best=best, weights=weights, config=config, digest=digest
            )

        @serve.batch(max_batch_size=config.max_batch, batch_wait_timeout_s=config.batch_wait_s)
        async def _predict(self, images: list[bytes]) -> list[Any]:
            return await asyncio.to_thread(self._classifier.predict, images)

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import JSONResponse

            status, answer = await self._classifier.answer(request, self._predict)
            return JSONResponse(answer, status_code=status)

    return Deployment.bind()  # type: ignore[attr-defined]


@contextlib.contextmanager
def serving(
    runs: Sequence[Path],
    *,
    best: bool,
    weights: str | None,
    config: ServeConfig,
    address: str | None,
) -> Iterator[tuple[str, Path]]:
    """Serve until the end of the block.

    Yields:
        The URL, and the file with the header that callers send.

    Raises:
        UserError: a run, the key or the port cannot be used.
    """
    from downpour.cluster.serving import inference
    from downpour.cluster.training.session import on_ray
    from downpour.workers.evaluation.predictor import Predictor

    loaded = [inference.load(run, best=best, weights=weights) for run in runs]
    Predictor([run.network for run in loaded], crops=config.crops)  # refuses bad crops now
    secret = key.read(Path(config.key_file)) if config.key_file else key.make()
    digest = key.digest(key.header(secret))
    _check_port(config)
    environment = key.environment(digest)
    with (
        key.kept(secret, f"serve-{config.port}") as header,
        on_ray(address=address, dashboard=False, environment=environment),
    ):
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            serve.start(
                proxy_location="HeadOnly",  # the address is one of this machine
                http_options={"host": config.host, "port": config.port},
                logging_config={"log_level": "ERROR", "enable_access_log": False},
            )
            serve.run(
                application(runs, best=best, weights=weights, config=config, digest=digest),
                name="downpour",
                route_prefix="/",
            )
            yield config.url, header
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _keep_to_loopback() -> None:
    """Have this replica listen on loopback for other deployments, of which there are none.

    Serve would listen on all addresses. Ray's token guards the port, but its address is no option,
    so this replaces a function of Ray's. A test notices if that function goes.
    """
    from ray.serve._private import replica

    module: Any = replica
    listen = module.add_port_to_grpc_server
    module.add_port_to_grpc_server = lambda server, address: listen(
        server, address.replace("[::]", "127.0.0.1")
    )


def _check_port(config: ServeConfig) -> None:
    import socket

    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"{config.host}:{config.port} cannot be listened on ({error.strerror}): give "
                "another --port or --host"
            ) from None


def wait_for_signal() -> None:
    """Wait for SIGTERM or SIGINT."""
    asked = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: asked.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        while not asked.wait(1.0):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
