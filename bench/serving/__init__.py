"""The serving benchmark: our engine beside PEFT, vLLM and llama.cpp."""
