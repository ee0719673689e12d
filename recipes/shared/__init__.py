"""What the recipes have in common: their arguments, their data, and the record that a run leaves behind."""
