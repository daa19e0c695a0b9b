"""A headless Chromium that is told over a pipe what to open; it tells what a page says, asks for, and how it is laid out.

    with Browser() as browser:
        seen = browser.open("runs/ties/report.html", width=390, dark=True)
        seen.requests, seen.said, seen.faults, seen.png

Standard library alone. `CHROMIUM` names the program where it is not on the path.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"),
)

# What is wider than the page, and texts of one drawing that lie on one another by more than a pixel or two.
LAYOUT = """(() => {
  const faults = [], page = document.documentElement;
  if (page.scrollWidth > window.innerWidth + 1) {
    const wide = [...document.querySelectorAll("body *")].filter(
      e => e.getBoundingClientRect().right > window.innerWidth + 1 && !e.closest(".scroll, pre, .sr, .skip"));
    faults.push(`the page is ${page.scrollWidth} wide: ${wide.slice(0, 3).map(e => e.tagName + "." + e.className)}`);
  }
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")].map(e => [e.textContent.trim(), e.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect(), name = svg.querySelector("title")?.textContent;
    texts.forEach(([a, p], i) => {
      if (a && (p.left < frame.left - 3 || p.right > frame.right + 3)) faults.push(`${name}: “${a}” leaves the drawing`);
      for (const [b, q] of texts.slice(i + 1)) {
        const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (a && b && x > 2 && y > 0.4 * Math.min(p.height, q.height)) faults.push(`${name}: “${a}” lies on “${b}”`);
      }
    });
  }
  for (const svg of document.querySelectorAll("svg[role=img]"))
    if (!svg.querySelector("desc")?.textContent && !svg.getAttribute("aria-label")) faults.push("a drawing without words");
  return [faults, page.scrollHeight];
})()"""

HIDING = """document.querySelectorAll("main > section, footer, header nav").forEach(e => {
  e.hidden = !ONLY.some(id => e.querySelector("#" + id));
})"""


@dataclass(frozen=True)
class Seen:
    """A page as it was shown: its picture, addresses asked for beside its own, what the console said, faults of layout."""

    png: bytes
    requests: list[str]
    said: list[str]
    faults: list[str]


def program() -> str | None:
    """The browser, where there is one."""
    return os.environ.get("CHROMIUM") or next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One process for many pages; gone, with its profile, when the block ends."""

    def __enter__(self) -> Browser:
        found = program()
        if found is None:
            raise FileNotFoundError("no Chromium; name one in CHROMIUM")
        self._home = tempfile.mkdtemp()
        heard, self._told = os.pipe()
        self._hears, tells = os.pipe()

        def placed() -> None:  # it reads from 3 and writes to 4
            high = os.dup(tells), os.dup(heard)
            os.dup2(high[1], 3)
            os.dup2(high[0], 4)

        command = [found, *OPTIONS, f"--user-data-dir={self._home}"]
        self._process = subprocess.Popen(command, preexec_fn=placed, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        os.close(heard)
        os.close(tells)
        self._rest, self._count, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        page = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._told)
        os.close(self._hears)
        shutil.rmtree(self._home, ignore_errors=True)

    def tell(self, method: str, **given: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer; events that come before it are kept."""
        self._count += 1
        asked = {"id": self._count, "method": method, "params": given}
        os.write(
            self._told, json.dumps(asked | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while (answer := self._next()).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._hears, 1 << 20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(
        self,
        page: str | Path,
        *,
        width: int = 1280,
        height: int | None = None,
        dark: bool = False,
        printed: bool = False,
        only: tuple[str, ...] = (),
    ) -> Seen:
        """A page, a file or an address, as it looks at a width; `height` of it at most, and of its sections `only` these."""
        address = str(page) if "://" in str(page) else Path(page).resolve().as_uri()
        look = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", media="print" if printed else "screen", features=[look])
        self._size(width, 900)
        self.events = []
        self.tell("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        if only:
            self.tell("Runtime.evaluate", expression=HIDING.replace("ONLY", json.dumps(only)))
        faults, whole = self.tell("Runtime.evaluate", expression=LAYOUT, returnByValue=True)["result"]["value"]
        clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or 12_000), "scale": 1}
        shot = self.tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        return Seen(base64.b64decode(shot), self._asked(address), self._said(), faults)

    def _size(self, width: int, height: int) -> None:
        phone = width < 500
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def _asked(self, address: str) -> list[str]:
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in sent if url != address and not url.startswith("data:")]

    def _said(self) -> list[str]:
        found = []
        for event in self.events:
            given = event.get("params", {})
            match event.get("method"):
                case "Log.entryAdded":
                    found.append(given["entry"]["text"])
                case "Runtime.consoleAPICalled":
                    found.append(" ".join(str(one.get("value", "")) for one in given["args"]))
                case "Runtime.exceptionThrown":
                    found.append(given["exceptionDetails"]["text"])
        return found
