"""Latency prediction: features, the CatBoost model, capacity tables."""
