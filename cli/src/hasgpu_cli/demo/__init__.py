"""The demo: the whole system once, with real models, and a report of what it did."""
