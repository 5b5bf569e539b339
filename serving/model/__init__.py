"""The forward pass of the Llama family over one flat batch."""
