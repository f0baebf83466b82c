"""What the entries share; knows none of the stages."""
