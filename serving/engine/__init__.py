"""One base model and its requests: scheduling, batches, sampling, text, and the thread that runs them."""
