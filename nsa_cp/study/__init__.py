"""Small models that show what the attention learns: tables of arms x learning rates x seeds, run several at a time."""
