"""From a model's forward to a graph of its operations, exact or refused."""
