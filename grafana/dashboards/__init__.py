"""The dashboards, as Python: grafanalib panels in, the JSON under ``grafana/generated`` out."""
