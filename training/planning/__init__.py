"""What is decided before a run: what it will take, and which learning rate and settings it should have."""
