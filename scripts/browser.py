"""The pages a user looks at, opened in a real browser: each method waits until its page shows what it is for.

The tests assert on them and scripts/screenshots.py takes the README's pictures of them.
"""

import contextlib
import shutil
from collections.abc import Iterator

from mlflow import MlflowClient
from playwright.sync_api import FrameLocator, Page, expect, sync_playwright

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
NO_ASSISTANT = """
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
"""
MODE = "?workflowType=machine_learning"
PATIENCE_MS = 60_000


def chromium() -> str | None:
    """Where Debian's browser is; playwright's own is not downloaded."""
    return shutil.which("chromium")


class Tour:
    """Pages of a tracking server and of one run on it."""

    def __init__(self, page: Page, server: str, run_id: str) -> None:
        self.page, self._server = page, server
        self.run = MlflowClient(server).get_run(run_id)
        self._experiment = f"{server}/#/experiments/{self.run.info.experiment_id}/runs"

    def runs(self) -> None:
        """The experiment's runs."""
        self._open(f"{self._experiment}{MODE}", f'text="{self.run.info.run_name}"')

    def charts(self) -> None:
        """The run's metrics, grouped by prefix."""
        self._open(f"{self._experiment}/{self.run.info.run_id}/model-metrics{MODE}", ".js-plotly-plot .scatterlayer")

    def artifact(self, *path: str) -> None:
        """A file among the run's artifacts."""
        self._open(f"{self._experiment}/{self.run.info.run_id}/artifacts{MODE}", f'text="{path[0]}"')
        for name in path:
            self.page.get_by_text(name, exact=True).first.click()

    def samples(self) -> None:
        """The table of what the model wrote."""
        self.artifact("samples.json")
        self.page.get_by_text("written").first.wait_for()

    def compare(self) -> FrameLocator:
        """The report of a comparison, inside the frame that the UI gives it."""
        self.artifact("compare", "compare.html")
        frame = self.page.frame_locator("iframe")
        frame.get_by_role("heading", name="BDH runs compared").wait_for()
        return frame

    def model(self, name: str) -> None:
        """A registered model."""
        self._open(f"{self._server}/#/models/{name}{MODE}", f'text="{name}"')

    def _open(self, url: str, selector: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(url)
        self.page.wait_for_selector(selector)


@contextlib.contextmanager
def touring(server: str, run_id: str, width: int = 1400, height: int = 800) -> Iterator[Tour]:
    """A browser for the time of the body."""
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE_MS)
        assert chromium(), "no chromium (Debian: apt-get install --no-install-recommends chromium)"
        browser = playwright.chromium.launch(executable_path=chromium(), args=QUIET)
        context = browser.new_context(viewport={"width": width, "height": height})
        context.add_init_script(NO_ASSISTANT)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        try:
            yield Tour(page, server, run_id)
        finally:
            browser.close()
