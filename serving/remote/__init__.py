"""Other people's servers as the engines of a base: vLLM, SGLang, and servers like them."""
