"""`hasgpu simulate`: what policies cost and let be late on profiles and traces, without a system running."""
