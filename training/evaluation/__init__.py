"""How good a checkpoint is: likelihoods, answers, and what of a difference is chance."""
