"""The Grafana dashboards as data; `python -m tools.dashboards` writes them."""
