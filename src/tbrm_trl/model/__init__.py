"""What runs a forward pass: the trajectory head, scoring, the reference."""
