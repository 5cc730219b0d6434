"""The pages of MLflow that users look at, opened in a real browser: each method returns when its page shows its content.

`tests/test_browser.py` checks them, and `scripts/screenshots.py` takes the pictures in README and docs/.
"""

import contextlib
import re
import shutil
from collections.abc import Iterator

from mlflow import MlflowClient
from playwright.sync_api import FrameLocator, Locator, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as NotShownError

CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CHROMIUM_ARGS += ["--disable-component-update", "--disable-sync"]
NO_ASSISTANT = """
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
"""
TRAINING_VIEW = "?workflowType=machine_learning"
TIMEOUT_MS = 60_000
CLICKS = 5


def chromium() -> str | None:
    """Path of Debian's browser, None if it is not installed; playwright's own browser is not downloaded."""
    return shutil.which("chromium")


class Tour:
    """Pages of a tracking server and of one run on it."""

    def __init__(self, page: Page, server: str, run_id: str) -> None:
        self.page, self._server = page, server
        self.run = MlflowClient(server).get_run(run_id)
        self._experiment = f"{server}/#/experiments/{self.run.info.experiment_id}/runs"

    def runs(self) -> None:
        """The experiment's runs."""
        self._open(f"{self._experiment}{TRAINING_VIEW}", f'text="{self.run.info.run_name}"')

    def charts(self) -> None:
        """The run's metrics, grouped by prefix."""
        self._open(f"{self._experiment}/{self.run.info.run_id}/model-metrics{TRAINING_VIEW}", ".js-plotly-plot .scatterlayer")

    def artifact(self, *path: str) -> None:
        """A file among the run's artifacts."""
        self._open(f"{self._experiment}/{self.run.info.run_id}/artifacts{TRAINING_VIEW}", f'text="{path[0]}"')
        for depth, name in enumerate(path, 1):
            chosen = self.page.get_by_text(re.compile(rf"/artifacts/{re.escape('/'.join(path[:depth]))}(\s|$)")).first
            for _ in range(CLICKS):  # one that comes while the tree of files is drawn again is lost
                self.page.get_by_text(name, exact=True).first.click()
                with contextlib.suppress(NotShownError):
                    chosen.wait_for(timeout=3_000)
                    break
            expect(chosen).to_be_visible()

    def samples(self) -> None:
        """The table of the model's samples."""
        self.artifact("samples.json")
        self.page.get_by_text("written").first.wait_for()

    def analysis(self, name: str, step: int) -> Locator:
        """The figure of an analysis."""
        self.artifact("analysis", name, f"step_{step}.svg")
        picture = self.page.locator("img[src^=blob]").first
        picture.wait_for()
        return picture

    def compare(self) -> FrameLocator:
        """The report of a comparison, in the frame in which the UI shows it."""
        self.artifact("compare", "compare.html")
        frame = self.page.frame_locator("iframe")
        frame.get_by_role("heading", name="BDH runs compared").wait_for()
        return frame

    def model(self, name: str) -> None:
        """A registered model."""
        self._open(f"{self._server}/#/models/{name}{TRAINING_VIEW}", f'text="{name}"')

    def _open(self, url: str, selector: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(url)
        self.page.wait_for_selector(selector)


@contextlib.contextmanager
def touring(server: str, run_id: str, width: int = 1400, height: int = 800) -> Iterator[Tour]:
    """A browser, open while the body runs."""
    with sync_playwright() as playwright:
        expect.set_options(timeout=TIMEOUT_MS)
        assert chromium(), "no chromium (Debian: apt-get install --no-install-recommends chromium)"
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
        context = browser.new_context(viewport={"width": width, "height": height})
        context.add_init_script(NO_ASSISTANT)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        try:
            yield Tour(page, server, run_id)
        finally:
            browser.close()
