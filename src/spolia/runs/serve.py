"""Experts behind the Open Inference Protocol: an ASGI application of starlette, and uvicorn for it.

    spolia serve digits:01 digits:23 --port 8080            then, elsewhere: Api.at("http://127.0.0.1:8080", "digits:01")

| path | answer |
|---|---|
| GET v2, v2/health/live, v2/health/ready | name and extensions; health needs no token |
| GET v2/models/NAME, …/ready, …/stats | metadata with the contract; whether it is ready; requests and inputs served so far |
| POST v2/models/NAME/infer | answers, tensors as JSON or binary |

Bodies are JSON and raw numbers; nothing is unpickled. What is wrong with a request is told as {"error", "code"} under a status
that says whether asking again can help.
"""

from __future__ import annotations

import asyncio
import hmac
import importlib.util
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from spolia import __version__
from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError
from spolia.parts.api_answers import Misfit
from spolia.parts.api_v2 import BINARY, LENGTH, packed, unpacked
from spolia.runs.serve_requests import Refusal, Served, answering, batch_of, body_of, metadata_of, wants_binary

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_IDLE = 75  # seconds that a silent connection is kept


class Desk:
    """What answers requests. `waiting`: requests that may wait for the one at work; more are told to come again."""

    def __init__(self, experts: Sequence[Served], token: str | None, waiting: int):
        self.experts = {expert.name: expert for expert in experts}
        self.counts = {name: {"inference_count": 0, "execution_count": 0} for name in self.experts}
        self.token, self.waiting, self.here = token, waiting, 0
        self._work = threading.Lock()

    async def server(self, request: Request) -> Response:
        self._admit(request)
        return _json({"name": "spolia", "version": __version__, "extensions": [BINARY, "statistics"]})

    async def metadata(self, request: Request) -> Response:
        return _json(metadata_of(self._expert(request)))

    async def ready(self, request: Request) -> Response:
        return _json({"name": self._expert(request).name, "ready": True})

    async def statistics(self, request: Request) -> Response:
        name = self._expert(request).name
        return _json({"model_stats": [{"name": name, "version": "1", **self.counts[name]}]})

    async def infer(self, request: Request) -> Response:
        from starlette.responses import Response

        expert = self._expert(request)
        body = await body_of(request, expert.contract)
        try:
            asked, tensors = unpacked(body, request.headers.get(LENGTH), "inputs")
        except Misfit as misfit:
            raise Refusal(400, "message", str(misfit)) from None
        batch = batch_of(tensors, expert.contract)
        if self.here >= self.waiting:
            raise Refusal(503, "busy", f"{self.here} requests wait already", **{"retry-after": "1"})
        self.here += 1  # only the loop's own thread comes here
        try:
            made = await asyncio.to_thread(self._computed, expert, batch)
        finally:
            self.here -= 1
        binary, head = wants_binary(asked), {"model_name": expert.name, "model_version": "1"}
        head |= {"id": asked["id"]} if isinstance(asked.get("id"), str) else {}
        answer, length = packed(head, "outputs", made, binary=binary)
        kind = "application/octet-stream" if binary else "application/json"
        return Response(answer, media_type=kind, headers={LENGTH: str(length)} if binary else None)

    def _admit(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            raise Refusal(401, "token", "a bearer token is asked for", **{"www-authenticate": "Bearer"})

    def _expert(self, request: Request) -> Served:
        self._admit(request)
        expert = self.experts.get(request.path_params["name"])
        if expert is None:
            raise Refusal(404, "unknown_model", f"no such model; served are {', '.join(self.experts)}")
        return expert

    def _computed(self, expert: Served, batch: np.ndarray) -> dict[str, np.ndarray]:
        with self._work, torch.no_grad():  # one at a time: each has all cores
            made = answering(expert.logits(torch.from_numpy(batch)), expert.contract)
            self.counts[expert.name]["inference_count"] += len(batch)
            self.counts[expert.name]["execution_count"] += 1
        return made


def application(experts: Sequence[Served], *, token: str | None = None, waiting: int = 64) -> Starlette:
    """The ASGI application. `token`: what requests have to bear."""
    check_installed()
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.routing import Route

    _check_names(experts)
    desk = Desk(experts, token, waiting)
    routes = [Route("/v2", desk.server), *(Route(f"/v2/health/{s}", _healthy(s)) for s in ("live", "ready"))]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/1"):
        routes += [Route(model, desk.metadata), Route(f"{model}/ready", desk.ready)]
        routes += [Route(f"{model}/stats", desk.statistics), Route(f"{model}/infer", desk.infer, methods=["POST"])]

    async def refused(_: Request, refusal: Any) -> Response:
        return _json({"error": str(refusal), "code": refusal.code}, refusal.status, refusal.headers)

    async def nowhere(request: Request, error: Any) -> Response:
        code = "method" if error.status_code == 405 else "not_found"
        what = f"{request.method} {request.url.path}: {error.detail}"
        return _json({"error": what, "code": code}, error.status_code, dict(error.headers or {}))

    async def broken(_: Request, error: Any) -> Response:
        return _json({"error": f"the expert failed: {type(error).__name__}", "code": "failed"}, 500)

    handlers: Any = {Refusal: refused, HTTPException: nowhere, Exception: broken}
    return Starlette(routes=routes, exception_handlers=handlers)


# --- serving ---------------------------------------------------------------------------------------------------------


def serve(app: Starlette, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve until interrupted. `ready(url)` is told when requests are taken."""
    listening = _listening(host, port)
    ready(_url(listening))
    with suppress(KeyboardInterrupt):  # uvicorn has finished what was asked, and passes it on
        _server(app).run(sockets=[listening])


@contextmanager
def served(app: Starlette, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Inside, served by a thread of this process, at the address that is yielded. Port 0: a free one."""
    listening = _listening(host, port)
    server = _server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield _url(listening)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def check_installed(command: str = "serve") -> None:
    """SpoliaError where what serves is not there."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise SpoliaError(what, where=command, mend="pip install 'spolia[api]'")


def _server(app: Starlette) -> Any:
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_keep_alive=_IDLE
    )
    return uvicorn.Server(config)


def _listening(host: str, port: int) -> socket.socket:
    try:
        listening = socket.create_server((host, port), backlog=128)
    except OSError as error:
        what = f"cannot be listened on: {error.strerror}"
        raise SpoliaError(what, where=f"{host}:{port}", mend="give another --host or --port") from None
    # Connections inherit it. Without, the body of an answer waits 40 ms for the other side to say that it has the headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{host}:{port}"


# --- requests --------------------------------------------------------------------------------------------------------


def _healthy(state: str) -> Any:
    async def answer(request: Request) -> Response:
        return _json({state: True})

    return answer


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status, headers)


def _check_names(experts: Sequence[Served]) -> None:
    """SpoliaError where two are called the same, or one so that no path can name it."""
    names = [expert.name for expert in experts]
    strange = [name for name in names if "/" in name or not name.strip() or not name.isprintable()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if strange or twice:
        what = f"no path can name {strange[0]!r}" if strange else f"two experts are called {twice[0]}"
        raise SpoliaError(what, where="serve", mend="give NAME=PATH")
