"""Do the clients that people use work with the server? `relora bench clients` asks them."""
