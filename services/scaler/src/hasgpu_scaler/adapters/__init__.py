"""What ties the scaler's core to the store."""
