"""The fault run: very many requests while everything that can go wrong does."""
