"""What ties the scheduler's core to the store."""
