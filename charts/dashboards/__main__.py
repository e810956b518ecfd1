"""`python -m charts.dashboards`: write the dashboards."""

from pathlib import Path

from charts.dashboards import fleet, operator, throughput, training
from charts.dashboards.panels import Dashboard, build
from grafana_foundation_sdk.cog.encoder import JSONEncoder

FOLDER = Path(__file__).parents[1] / "grpo-operator" / "files" / "dashboards"
DASHBOARDS = (training.DASHBOARD, throughput.DASHBOARD, fleet.DASHBOARD, operator.DASHBOARD)


def text(page: Dashboard) -> str:
    """The file."""
    return JSONEncoder(sort_keys=True, indent=1).encode(build(page)) + "\n"


if __name__ == "__main__":
    for page in DASHBOARDS:
        (FOLDER / f"{page.uid}.json").write_text(text(page))
