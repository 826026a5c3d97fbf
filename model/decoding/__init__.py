"""How the next token is chosen: parameters, stages, noise, stopping."""
