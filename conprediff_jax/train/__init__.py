"""The trainer: the train loop, what it loads and measures before, and its log."""
