"""A Ray Serve deployment that answers images, or rows of numbers, over HTTP.

    POST /predict     an image file as the body, or in a form, or rows as JSON; JSON with the most
                      probable classes, or what the task has
    GET  /stats       how many requests in how many batches so far

Requests that arrive together go through the network together (`batches`, `classifier`). Callers
have to show a key (`key`), whatever the address, and wait in a line that is bounded (`gate`,
`line`). The default address is loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from downpour.cluster.errors import UserError
from downpour.cluster.serving.server import gate, key
from downpour.cluster.serving.server.batches import Answer, Asked
from downpour.cluster.serving.server.classifier import Classifier, Item
from downpour.cluster.serving.server.replicas import APPLICATION, RETRY_S
from downpour.cluster.serving.settings import MAX_BODY_BYTES, ServeConfig
from downpour.shuffler.dataset.columns import Columns


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
        # The gate sends as many batches as the replicas take, so that Serve's router never has to
        # look for room. A proxy that ran before this deployment has no gate: there each request
        # comes by itself, and Serve sends the rest away.
        max_ongoing_requests=4 * config.max_batch,
        max_queued_requests=config.max_waiting,
        backpressure_config={"retry_after_s": RETRY_S},
        ray_actor_options={"num_cpus": 1},
    )
    class Deployment:
        def __init__(self) -> None:
            _keep_to_loopback()
            folders = [str(run.absolute()) for run in runs]
            self._classifier = Classifier(
                folders, best=best, weights=weights, config=config, digest=digest
            )
            self._one_at_a_time = asyncio.Lock()

        async def answer_all(self, batch: Sequence[Asked]) -> list[Answer]:
            async with self._one_at_a_time:
                return await asyncio.to_thread(self._classifier.answer_all, batch)

        @serve.batch(max_batch_size=config.max_batch, batch_wait_timeout_s=config.batch_wait_s)
        async def _predict(self, items: list[Item]) -> list[Any]:
            return await asyncio.to_thread(self._classifier.predict, items)

        async def __call__(self, request: Any) -> Any:
            from starlette.responses import JSONResponse

            status, answer, more = await self._classifier.answer(request, self._predict)
            return JSONResponse(answer, status_code=status, headers=dict(more))

    return Deployment.bind()  # type: ignore[attr-defined]


@contextlib.contextmanager
def serving(
    runs: Sequence[Path],
    *,
    best: bool,
    weights: str | None,
    config: ServeConfig,
    address: str | None,
) -> Iterator[tuple[str, Path, str]]:
    """Serve until the end of the block.

    Yields:
        The URL, the file with the header that callers send, and what they send with curl, to try.

    Raises:
        UserError: a run, the key or the port cannot be used.
    """
    from downpour.cluster.serving import inference
    from downpour.cluster.training.session import on_ray
    from downpour.workers.evaluation.predictor import Predictor

    loaded = inference.load_all(runs, best=best, weights=weights, orientation=config.orientation)
    Predictor([run.network for run in loaded], crops=config.crops)  # refuses bad crops now
    sent = example(loaded[0].network.spec.columns)
    secret = key.read(Path(config.key_file)) if config.key_file else key.make()
    digest = key.digest(key.header(secret))
    _check_port(config)
    environment = gate.environment(
        gate.GateRules(
            digest=digest,
            most_bytes=MAX_BODY_BYTES,
            at_once=config.at_once,
            most_waiting=config.max_waiting,
            longest_wait_s=config.longest_wait_s,
            max_batch=config.max_batch,
            batch_wait_s=config.batch_wait_s,
            under_way=2 * config.copies,
        )
    )
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
                name=APPLICATION,
                route_prefix="/",
            )
            yield config.url, header, sent
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


def example(columns: Columns) -> str:
    """Return a body for curl that a network may take: its numbers are 0."""
    if not columns.inputs:
        return "--data-binary @image.jpg"
    if columns.input_shape:
        return "--data-binary @rows.json"
    widths = dict(zip(columns.inputs, columns.input_widths, strict=True))
    row = {name: 0 if width == 1 else [0] * width for name, width in widths.items()}
    return f"--data-binary {shlex.quote(json.dumps({'rows': [row]}))}"


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
