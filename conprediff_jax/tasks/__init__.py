"""The tasks that can be trained, and the train step."""
