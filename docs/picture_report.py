"""Make images/report.png from the report of a run; Chromium must be installed.

slora run --engine inline -c run.eval-plain=true
slora report
python docs/picture_report.py ~/.slora/runs/NAME/report.html
"""

import shutil
import subprocess
import sys
from pathlib import Path

TO = Path(__file__).parent / "images" / "report.png"


def picture(page: Path, to: Path) -> None:
    """Write a picture of the top of a page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("neither chromium nor google-chrome is installed")
    options = "--headless=new --no-sandbox --hide-scrollbars --window-size=1100,1200"
    command = [browser, *options.split(), f"--screenshot={to}", page.resolve().as_uri()]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    picture(Path(sys.argv[1]), TO)
