"""Grafana dashboards as code: `python -m charts.dashboards` writes the files that the chart ships (charts/grpo-operator/files/dashboards)."""
