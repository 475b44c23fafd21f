"""Several attacks on the same victims, several ways to make a small training set."""
