"""The Resource-aware Performance Predictor as a service."""
