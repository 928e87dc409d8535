"""`hasgpu profile`: what to measure, the file that it goes into, and the run."""
