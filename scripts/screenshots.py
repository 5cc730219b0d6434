"""Take the pictures of README and docs/: `python scripts/screenshots.py http://127.0.0.1:5000 RUN_ID MODEL`.

Needs `pip install -e '.[dev]'`, Debian's chromium, a running `mlflow ui` or server, and on it a run with a kept comparison
(`bdh-mlflow compare`) and a registered model. Writes docs/{runs,metrics,samples,compare,model}.png.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from playwright.sync_api import Page

from scripts.browser import touring

DOCS = Path(__file__).parent.parent / "docs"


def main(server: str, run_id: str, model: str) -> None:
    with touring(server, run_id, height=1080) as tour:
        tour.runs()
        picture(tour.page, "runs")
        tour.charts()
        tour.page.get_by_placeholder("Search metric charts").fill("^(train|val)/")
        picture(tour.page, "metrics")
        tour.samples()
        picture(tour.page, "samples")
        tour.model(model)
        picture(tour.page, "model")
    with touring(server, run_id, width=1800, height=1400) as tour:
        tour.compare()
        picture(tour.page, "compare")


def picture(page: Page, name: str) -> None:
    page.wait_for_timeout(2500)  # until the charts have stopped moving
    page.screenshot(path=str(DOCS / f"{name}.png"))
    print(DOCS / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
