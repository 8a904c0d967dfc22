"""Training: phases, the loop, balancing, tracking and plans."""
