"""The dashboard: pages, charts and live news for people."""
