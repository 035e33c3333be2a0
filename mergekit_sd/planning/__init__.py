"""From a recipe to a plan: every output tensor's place and making, known before a weight is read."""
