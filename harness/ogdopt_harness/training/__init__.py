"""Methods, and the loop that trains with them."""
