"""One adapter on its way to a new base: the rungs, cheapest first, and the gate."""
