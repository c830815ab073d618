"""What warmup learns."""
