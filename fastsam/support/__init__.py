"""What everything else stands on: checks of arguments, signals held back, free memory, what was built."""
