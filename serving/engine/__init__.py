"""The engine of one base model: scheduling, batches, sampling, text, and the thread that runs it."""
