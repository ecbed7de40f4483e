"""Apple's GPUs: a whole program as Metal source, and a plan of launches."""
