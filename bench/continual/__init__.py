"""The benchmark of class-incremental learning."""
