"""From scores and rewards to the loss and its metrics: arithmetic alone."""
