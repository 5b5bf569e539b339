"""One adapter's way from base v1 to base v2, and a whole fleet's."""
