"""A trained model and what is drawn from it: images, shards of many, fillings."""
