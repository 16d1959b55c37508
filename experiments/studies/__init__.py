"""What the paper lacks: statistics and experiments of our own, each a program."""
