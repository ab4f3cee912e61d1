"""A real Chromium for the page's tests, driven over the DevTools protocol only.

The protocol: https://chromedevtools.github.io/devtools-protocol/. One process serves all tests of a module; every page
has its own browser context, so tests share no storage.
"""

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.support.processes import start, wait_for
from tests.support.servers import missing
from tests.support.waiting import SLOW

DESKTOP = (1100, 760)
PHONE = (390, 844)
_PATIENCE = 20.0 * SLOW
"""Time limit, in seconds, for a condition on a busy machine."""

_SETTLED = """async (element) => {
    element.scrollIntoView({ block: "nearest" });
    for (let frame = 0, before; ; frame++) {
        const box = element.getBoundingClientRect();
        if (frame >= 20 || (before?.x === box.x && before.y === box.y)) return box.toJSON();
        before = box;
        await new Promise(requestAnimationFrame);
    }
}"""
"""Returns the place of an element that has not moved since the last frame, or still moves after 20 of them."""

_MESSAGES = """(mode, work) => new Promise((resolve, reject) => {
  const opening = indexedDB.open("imstream", 1);
  opening.onerror = () => reject(opening.error);
  opening.onsuccess = () => {
    const request = work(opening.result.transaction("messages", mode).objectStore("messages"));
    request.onerror = () => reject(request.error);
    request.onsuccess = () => (opening.result.close(), resolve(request.result));
  };
})"""
"""Works with the messages that the page keeps."""

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, where the sandbox refuses to start
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",  # containers have a small /dev/shm
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--remote-debugging-port=0",
)


def chromium_binary() -> str:
    """The Chromium on this machine. Without one the test is skipped; in CI it fails."""
    # Debian's /usr/bin/chromium-headless-shell is a script that does not pass signals on to the browser.
    debian = "/usr/lib/chromium/chromium-headless-shell"
    for name in (debian, "chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    missing("chromium")
    raise AssertionError


@contextmanager
def running_chromium(*flags: str) -> Iterator[str]:
    """Run a headless Chromium with a new profile; yield the address of its DevTools socket."""
    command = [chromium_binary(), *_FLAGS, *flags]
    with tempfile.TemporaryDirectory(prefix="imstream-chromium-", ignore_cleanup_errors=True) as folder:
        profile = Path(folder) / "profile"
        with start([*command, f"--user-data-dir={profile}", "about:blank"], Path(folder) / "chromium.log") as process:
            port_file = profile / "DevToolsActivePort"
            wait_for(lambda: bool(_lines(port_file)[1:]), process, "chromium", _PATIENCE)
            port, path = _lines(port_file)
            yield f"ws://127.0.0.1:{port}{path}"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


class DevTools:
    """One DevTools connection: numbered commands out, answers and events in."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Execute one command.

        Raises:
            AssertionError: Chromium refused it.
        """
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "method": method, "params": params}
        await self._socket.send(json.dumps(command | ({"sessionId": session} if session else {})))
        async with asyncio.timeout(_PATIENCE):
            said = await answer
        assert "error" not in said, f"{method}: {said.get('error')}"
        result: dict[str, Any] = said["result"]
        return result

    async def listen(self) -> None:
        """Deliver answers to their waiters until the connection ends."""
        with suppress(ConnectionClosed):
            async for text in self._socket:
                said = json.loads(text)
                if "id" in said:
                    self._answers.pop(said["id"]).set_result(said)
                else:
                    self.events.append(said)


class Page:
    """One tab with its own storage."""

    def __init__(self, devtools: DevTools, session: str, context: str) -> None:
        self.devtools = devtools
        self._session = session
        self.context = context
        self._forgiven: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        """Execute one DevTools command in this tab."""
        return await self.devtools.call(method, self._session, **params)

    async def visit(self, url: str) -> None:
        """Open an address and wait until its scripts have run."""
        await self.call("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    async def evaluate(self, script: str) -> Any:  # noqa: ANN401 - whatever the script gives
        """Return the JSON value of a JavaScript expression; promises are awaited.

        Raises:
            AssertionError: The script threw.
        """
        said = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    async def until(self, condition: str) -> Any:  # noqa: ANN401 - whatever the condition gives
        """Wait until a JavaScript expression is truthy; return its value.

        Raises:
            AssertionError: It was not truthy in time. The message has the page's text.
        """
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with suppress(AssertionError):  # a navigation may destroy the script's context
                if value := await self.evaluate(condition):
                    return value
            await asyncio.sleep(0.02)
        raise AssertionError(f"never true: {condition}\n{await self.evaluate('document.body.innerText')}")

    async def click(self, selector: str) -> None:
        """Click the middle of the element with the mouse, once it is visible and does not move."""
        find = f"document.querySelector({json.dumps(selector)})"
        await self.until(f"{find}?.checkVisibility()")
        box = await self.evaluate(f"({_SETTLED})({find})")
        spot = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        await self.call("Input.dispatchMouseEvent", type="mousePressed", **spot)
        await self.call("Input.dispatchMouseEvent", type="mouseReleased", **spot)

    async def fill(self, selector: str, text: str) -> None:
        """Focus a field and replace its content."""
        await self.click(selector)
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release one key."""
        text = {"Enter": "\r"}.get(key, "")
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        common: dict[str, Any] = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": code,
            "modifiers": 8 if shift else 0,
        }
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def kept(self) -> list[dict[str, Any]]:
        """Return the messages that the page keeps in the browser, the oldest first."""
        records: list[dict[str, Any]] = await self.evaluate(f"({_MESSAGES})('readonly', (store) => store.getAll())")
        return sorted(records, key=lambda record: record["at"])

    async def keep(self, **record: object) -> None:
        """Have the page keep a message of the user who is logged in, as if it had ended a moment ago."""
        ended = {"id": "c1.m1", "conversation": "c1", "contents": "?", "text": "", "status": "done", **record}
        put = f"(store) => store.put({{...{json.dumps(ended)}, at: Date.now(), owner}})"
        await self.evaluate(
            f"(async () => {{ const owner = JSON.parse(sessionStorage['imstream.owner']); "
            f"sessionStorage['imstream.conversation'] = JSON.stringify('{ended['conversation']}'); "
            f"await ({_MESSAGES})('readwrite', {put}) }})()"
        )

    async def look(self, size: tuple[int, int], *, dark: bool = False) -> None:
        """Set the size of the screen in CSS pixels, and whether the person prefers dark colours."""
        width, height = size
        phone = width < 600  # a width between phones and desktops
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=phone
        )
        await self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def drawn(self) -> None:
        """Wait until the page is drawn: until then, parts that scroll may have the size of their content before."""
        await self.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    async def screenshot(self) -> bytes:
        """Return a PNG of the visible part."""
        await self.drawn()
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def allow_clipboard(self) -> None:
        """Grant this tab clipboard access, as if the user had allowed it."""
        origin = await self.evaluate("location.origin")
        permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        await self.devtools.call(
            "Browser.grantPermissions", origin=origin, permissions=permissions, browserContextId=self.context
        )

    def forgive_absence(self) -> None:
        """Discard errors about an unreachable node: the test caused them."""
        unreachable = (
            "CONNECTION_REFUSED",
            "CONNECTION_RESET",
            "CONNECTION_CLOSED",
            "SOCKET_NOT_CONNECTED",
            "EMPTY_RESPONSE",
        )
        self.forgive(*(f"ERR_{name}" for name in unreachable), "Unexpected response code: 503")

    def forgive(self, *words: str) -> None:
        """Discard errors that contain these words: the test caused them."""
        self._forgiven += words

    @property
    def complaints(self) -> list[str]:
        """Errors of the browser: uncaught exceptions, console errors, violations of the page's policy."""
        found = []
        for event in self.devtools.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(f"{params['entry']['source']}: {params['entry']['text']}")
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in {"error", "assert"}:
                found.append(str(params["args"]))
        return [words for words in found if not any(forgiven in words for forgiven in self._forgiven)]


@asynccontextmanager
async def open_page(chromium: str, *, lang: str = "en-US") -> AsyncIterator[Page]:
    """A new tab with the language `lang` and storage of its own, closed at the end."""
    async with connect(chromium, max_size=None, ping_interval=None) as socket:
        devtools = DevTools(socket)
        listening = asyncio.create_task(devtools.listen())
        try:
            context = (await devtools.call("Target.createBrowserContext"))["browserContextId"]
            yield await _new_tab(devtools, context, lang)
            await devtools.call("Target.disposeBrowserContext", browserContextId=context)
        finally:
            await socket.close()
            await listening


async def open_tab(page: Page) -> Page:
    """Another tab with the same storage; its errors are those of the first one."""
    return await _new_tab(page.devtools, page.context, "en-US")


async def _new_tab(devtools: DevTools, context: str, lang: str) -> Page:
    target = await devtools.call("Target.createTarget", url="about:blank", browserContextId=context)
    session = await devtools.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
    page = Page(devtools, session["sessionId"], context)
    for domain in ("Page", "Runtime", "Log"):
        await page.call(f"{domain}.enable")
    agent = await page.evaluate("navigator.userAgent")
    await page.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=lang)
    await page.look(DESKTOP)
    return page
