"""Make the README's pictures again: `python docs/screenshots.py http://127.0.0.1:5000 RUN_ID`.

Needs a running `mlflow ui` or server, Debian's chromium and `pip install playwright`. Opens three pages of the run in a real browser and
writes docs/{runs,metrics,artifacts}.png.
"""

import sys
from pathlib import Path

from mlflow import MlflowClient
from playwright.sync_api import Page, sync_playwright

CHROMIUM = "/usr/bin/chromium"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
NO_ASSISTANT = """
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
"""
HERE = Path(__file__).parent


def main(server: str, run_id: str) -> None:
    run = MlflowClient(server).get_run(run_id)
    experiment = f"{server}/#/experiments/{run.info.experiment_id}/runs"
    machine_learning = "?workflowType=machine_learning"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        context = browser.new_context(viewport={"width": 1400, "height": 800})
        context.add_init_script(NO_ASSISTANT)
        page = context.new_page()
        open_page(page, f"{experiment}{machine_learning}", f"text={run.info.run_name}")
        picture(page, "runs")
        open_page(page, f"{experiment}/{run_id}/model-metrics{machine_learning}", ".js-plotly-plot .scatterlayer")
        page.mouse.move(700, 500)
        for _ in range(14):  # charts are drawn when they come into view; train and val are the last sections
            page.mouse.wheel(0, 500)
            page.wait_for_timeout(500)
        page.mouse.wheel(0, -780)
        picture(page, "metrics")
        open_page(page, f"{experiment}/{run_id}/artifacts{machine_learning}", "text=checkpoints")
        page.click("text=checkpoints")
        page.click(f"text={run.data.tags['bdh.run_dir']}")
        page.click("text=samples")
        page.click(f"text=step_{run.data.tags['bdh.stop_step']}.txt")
        picture(page, "artifacts")
        browser.close()


def open_page(page: Page, url: str, selector: str) -> None:
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_selector(selector, timeout=60_000)


def picture(page: Page, name: str) -> None:
    page.wait_for_timeout(2500)
    page.screenshot(path=str(HERE / f"{name}.png"))
    print(HERE / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
