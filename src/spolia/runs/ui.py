"""Runs in the browser: an ASGI application of starlette that shows the runs under one folder, and changes nothing.

| path, after the token | shows |
|---|---|
| / | the runs, with a form that compares those chosen; asked again now and then |
| run?id= | one run; its live part asks `live?id=` again while the run goes on |
| report?id= | the run's report.html, in a sandbox without scripts |
| compare?run=&run= | two runs or more, side by side |
| style.css, live.js, list.js | the look, and the scripts that follow a run and the list |

The token stands in the path, not in a cookie: a browser sends cookies to every port of a host. A `Host` that is not this
machine is refused, so that no name that another site points here can read the pages. `render` makes them: (file, facts) ->
text.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.errors import SpoliaError
from spolia.runs import ui_runs
from spolia.runs.serve import check_installed

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

Render = Callable[[str, dict[str, Any]], str]
HOST = "127.0.0.1"
MOST_COMPARED = 10
_NONE = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
_OWN = _NONE + "style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; form-action 'self'"
_REPORT = _NONE + "sandbox allow-downloads; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class NotShown(Exception):
    """A page that is not there, or not for the one who asks."""

    def __init__(self, status: int, title: str, what: str):
        super().__init__(what)
        self.status, self.title = status, title


class Window:
    """What answers requests about the runs under `top`."""

    def __init__(self, top: Path, token: str, render: Render):
        self.top, self.token, self.render = top, token.encode(), render

    def index(self, request: Request) -> Response:
        self._admit(request)
        runs = ui_runs.runs_under(self.top)
        return self._page("runs.html.j2", {"folder": str(self.top), "runs": runs, "most": ui_runs.MOST_RUNS})

    def run(self, request: Request) -> Response:
        return self._page("run.html.j2", self._followed(request))

    def live(self, request: Request) -> Response:
        return self._page("live.html.j2", self._followed(request))

    def report(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        page = ui_runs.read(self._found(request).path / "report.html", ui_runs.LARGEST_REPORT)
        if not page:
            raise NotShown(404, "No report", "This run has no report, or none that can be shown.")
        return HTMLResponse(page, headers=_HEADERS | {"content-security-policy": _REPORT})

    def compare(self, request: Request) -> Response:
        self._admit(request)
        chosen = list(dict.fromkeys(request.query_params.getlist("run")))[: MOST_COMPARED + 1]
        if not 2 <= len(chosen) <= MOST_COMPARED:
            raise NotShown(400, "Choose runs", f"Choose two runs or more, {MOST_COMPARED} at most.")
        runs = [self._at(id) for id in chosen]
        try:
            found = ui_runs.compared(runs, self.top)
        except (SpoliaError, ValueError) as error:
            told = str(error).replace(f"{self.top}/", "")
            raise NotShown(400, "These runs do not compare", told) from None
        return self._page("compare.html.j2", {"found": found})

    def style(self, request: Request) -> Response:
        return self._file(request, "style.css", "text/css")

    def live_script(self, request: Request) -> Response:
        return self._file(request, "live.js", "text/javascript")

    def list_script(self, request: Request) -> Response:
        return self._file(request, "list.js", "text/javascript")

    def nowhere(self, request: Request) -> Response:
        self._admit(request)
        raise NotShown(404, "There is no such page", "The list of runs leads to all that there is.")

    def refused(self, request: Request, error: Any) -> Response:
        """The page that says what is wrong. The way back is told to those alone who had the token."""
        told = isinstance(error, NotShown)
        status = error.status if told else getattr(error, "status_code", 500)
        title = error.title if told else "This cannot be shown"
        what = str(error) if told else getattr(error, "detail", type(error).__name__)
        root = f"/{self.token.decode()}/" if told and status != 403 else ""
        return self._page("message.html.j2", {"title": title, "what": what, "root": root}, status)

    def _admit(self, request: Request) -> None:
        if not hmac.compare_digest(request.path_params.get("token", "").encode(), self.token):
            raise NotShown(
                403, "Open the whole address", "Its token is missing or wrong. `spolia ui` prints the address."
            )

    def _found(self, request: Request) -> ui_runs.Run:
        self._admit(request)
        return self._at(request.query_params.get("id", ""))

    def _at(self, id: str) -> ui_runs.Run:
        run = ui_runs.run_at(self.top, id)
        if run is None:
            raise NotShown(
                404, "There is no such run", "It may have been moved. The list of runs shows those that are there."
            )
        return run

    def _followed(self, request: Request) -> dict[str, Any]:
        run = self._found(request)
        said = {"recipe": ui_runs.text(run, "recipe.yaml"), "summary": ui_runs.text(run, "summary.txt")}
        return {"run": run, "lines": ui_runs.last_lines(run), **said}

    def _file(self, request: Request, name: str, kind: str) -> Response:
        from starlette.responses import Response

        self._admit(request)
        return Response(self.render(name, {}), media_type=kind, headers=_HEADERS)

    def _page(self, name: str, facts: dict[str, Any], status: int = 200) -> Response:
        from starlette.responses import HTMLResponse

        text = self.render(name, facts).encode("utf-8", "replace")
        return HTMLResponse(text, status, headers=_HEADERS | {"content-security-policy": _OWN})


def application(top: Path, token: str, render: Render) -> Starlette:
    """The ASGI application for the runs under `top`. SpoliaError where that is no folder."""
    check_installed("ui")
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    if not top.is_dir():
        mend = "name the folder that holds your runs: spolia ui FOLDER"
        raise SpoliaError("there is no such folder", where=str(top), mend=mend)
    window = Window(top.resolve(), token, render)
    pages = {"": window.index, "run": window.run, "live": window.live, "report": window.report}
    pages |= {"compare": window.compare, "style.css": window.style, "live.js": window.live_script}
    pages |= {"list.js": window.list_script}
    routes = [Route(f"/{{token}}/{name}", page, methods=["GET"]) for name, page in pages.items()]
    routes += [Route(path, window.nowhere, methods=["GET"]) for path in ("/", "/{token}/{rest:path}")]
    handlers: Any = dict.fromkeys((NotShown, HTTPException, Exception), window.refused)
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)
    return Starlette(routes=routes, middleware=[hosts], exception_handlers=handlers)
