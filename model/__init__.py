"""What the network is, how it is stored, how the next token is chosen."""
