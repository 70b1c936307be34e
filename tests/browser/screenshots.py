"""Takes the pictures of docs/playground.md anew: `python -m tests.browser.screenshots`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.browser.chromium import open_page, running_chromium
from tests.server.test_live import Server
from trunkline.config.resolve import SEEDLING

DOCS = Path(__file__).resolve().parents[2] / "docs"
LIMIT = 300_000  # bytes
SIZE = (1280, 800)


def chat(page: Any) -> None:
    """An answer under a schema, token by token."""
    page.get_by_role("checkbox", name="JSON schema").check()  # the example that it puts in
    page.get_by_role("textbox", name="Message").fill("Extract name and age: Mara Lind is 41 years old.")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Another answer").click()  # this time the cache has its beginning
    page.get_by_label("Branch 2 of 2").wait_for()
    answer = page.locator(".message.assistant").last
    answer.get_by_role("button", name="Show the tokens").click()
    answer.locator(".token.cached").first.wait_for()
    answer.locator("button.token").nth(3).focus()
    page.mouse.move(0, 0)
    page.locator(".panel-body").evaluate("e => e.scrollTop = 0")


def live(page: Any) -> None:
    """Requests that share a trunk."""
    page.get_by_role("navigation").get_by_role("link", name="Live").click()
    page.get_by_role("button", name="Send eight prompts that begin alike").click()
    page.locator(".tree .request").nth(3).wait_for()
    page.wait_for_timeout(150)  # what is new has grown to its place


def main() -> None:
    server = Server(SEEDLING, "--served-model-name", "seedling")
    try:
        with running_chromium() as browser:
            for name, act, scheme in (("tokens", chat, "light"), ("live", live, "dark")):
                page = open_page(browser, server.url, size=SIZE, color_scheme=scheme)
                page.locator(".example").first.wait_for()
                act(page)
                path = DOCS / f"playground-{name}.png"
                page.screenshot(path=path)
                if path.stat().st_size > LIMIT:
                    raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than {LIMIT}")
                print(path, path.stat().st_size)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
