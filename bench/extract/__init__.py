"""The extraction benchmark: speed, energy, memory, and the quality of extracted adapters when served."""
