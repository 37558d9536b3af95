"""Linear layers in 8 and 4 bits: what a recipe needs, which layers it takes, and the libraries that convert them."""
