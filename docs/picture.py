"""Take the picture of the playground that README.md shows: a completion, and where one of its tokens came from.

python docs/picture.py --url http://127.0.0.1:8000

Needs a server whose playground is on (`make demo` leaves one), Debian's chromium, and playwright.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

PICTURE = Path(__file__).parent / "pictures" / "playground.png"
WIDTH, HEIGHT, SCALE = 1100, 1280, 1.2
PATIENCE_MS = 120_000


def main() -> None:
    """Parse arguments and take it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--prompt", default="The with statement is used to wrap the execution of a block with")
    parser.add_argument("--token", default=" context", help="a token of the completion, to be chosen")
    args = parser.parse_args()
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE)
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{args.url}/playground/")
        page.locator("#knnlm-prompt textarea").fill(args.prompt)
        page.get_by_role("button", name="Complete", exact=True).click()
        mixed = page.locator("#knnlm-mixed")
        expect(mixed).to_contain_text("allowed")
        mixed.locator("[data-token]", has_text=args.token.strip()).first.click()
        expect(page.locator("#knnlm-panel li").first).to_be_visible()
        page.mouse.move(0, 0)
        page.screenshot(path=PICTURE)
        browser.close()


if __name__ == "__main__":
    main()
