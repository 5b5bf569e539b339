"""Class-incremental learning measured."""
