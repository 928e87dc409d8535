"""The hybrid auto-scaler."""
