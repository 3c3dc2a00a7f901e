"""How plots look, and those that W&B and the report share."""
